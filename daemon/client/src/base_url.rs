//! Parses the URL of a service.

use hyper::Uri;

use crate::error::ClientError;

/// The URL of a service, split into its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BaseUrl {
    /// `true` for `https://`.
    pub(crate) secure: bool,
    /// Host and port as written in the URL: used in the `Host` header and in messages.
    pub(crate) authority: String,
    /// The host as a name or an address. An IPv6 address has no brackets here.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Prefix of every path: either empty, or it starts with a slash and ends without one.
    pub(crate) prefix: String,
}

impl BaseUrl {
    /// Parses a URL such as `http://127.0.0.1:8080`.
    ///
    /// # Errors
    /// [`ClientError::Url`].
    pub(crate) fn parse(url: &str) -> Result<Self, ClientError> {
        let bad = |problem: &str| ClientError::Url { url: url.to_owned(), problem: problem.to_owned() };
        let uri: Uri = url.parse().map_err(|error: hyper::http::uri::InvalidUri| bad(&error.to_string()))?;
        let secure = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad("it starts with neither http:// nor https://")),
        };
        if uri.query().is_some() {
            return Err(bad("it has a query"));
        }
        let authority = uri.authority().ok_or_else(|| bad("it names no host"))?;
        let host = authority.host();
        if host.is_empty() || authority.as_str().contains('@') {
            return Err(bad("it names no host, or a user"));
        }
        // An IPv6 address has brackets only inside a URL.
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Self {
            secure,
            authority: authority.to_string(),
            host,
            port: authority.port_u16().unwrap_or(if secure { 443 } else { 80 }),
            prefix: uri.path().trim_end_matches('/').to_owned(),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart_or_explained() {
        let url = BaseUrl::parse("https://[::1]:8443/base/").unwrap();
        assert_eq!((url.secure, &*url.authority, &*url.host), (true, "[::1]:8443", "::1"));
        assert_eq!((url.port, &*url.prefix), (8443, "/base"));
        let url = BaseUrl::parse("http://host").unwrap();
        assert_eq!((url.secure, url.port, &*url.prefix), (false, 80, ""));
        assert_eq!(BaseUrl::parse("https://host").unwrap().port, 443);
        for (url, expected) in [
            ("ftp://host", "neither http:// nor https://"),
            ("host:80", "write it like http://host:8080"),
            ("http://", "write it like"),
            ("http://user@host", "names no host, or a user"),
            ("http://host/?query", "it has a query"),
        ] {
            let message = BaseUrl::parse(url).unwrap_err().to_string();
            assert!(message.contains(expected), "{url}: {message}");
        }
    }
}
