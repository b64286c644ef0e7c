//! The protocol's resources in one table, and the resource that a URL requests.

use claviger_protocol::attestation::ErrorReply;
use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::payload::ApiVersion;
use hyper::Method;
use hyper::header::{CONTENT_TYPE, HeaderMap};

use super::answer::Answer;

/// The function of a resource.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Endpoint {
    Roll(ApiVersion),
    RollBatch,
    Metadata,
    HostKeyAttest,
    TpmAttest,
    /// TPM mode with the first version of the protocol, whose Context format is not published.
    FirstTpmAttest,
    /// Attestation by Active Directory, which is not supported.
    DomainAttest,
    GetInfo,
    SigningCertificates,
}

/// All resources in lower case: paths are case-insensitive.
static RESOURCES: [(&str, Method, Endpoint); 10] = [
    ("/keyprotection/service/v1.0/rolltransportkey", Method::POST, Endpoint::Roll(ApiVersion::V1)),
    ("/keyprotection/service/v2.0/rolltransportkey", Method::POST, Endpoint::Roll(ApiVersion::V2)),
    ("/keyprotection/service/v2.0/rolltransportkeys", Method::POST, Endpoint::RollBatch),
    ("/keyprotection/service/metadata/2014-07/metadata.xml", Method::GET, Endpoint::Metadata),
    ("/attestation/v2.0/hostkeyattest", Method::POST, Endpoint::HostKeyAttest),
    ("/attestation/v1.0/attest", Method::POST, Endpoint::FirstTpmAttest),
    ("/attestation/v2.0/attest", Method::POST, Endpoint::TpmAttest),
    ("/attestation/v1.0/domainattest", Method::POST, Endpoint::DomainAttest),
    ("/attestation/getinfo", Method::GET, Endpoint::GetInfo),
    ("/attestation/v2.0/signingcertificates", Method::GET, Endpoint::SigningCertificates),
];

impl Endpoint {
    /// The name in the metrics.
    fn name(self) -> &'static str {
        match self {
            Self::Roll(ApiVersion::V1) => "release_v1",
            Self::Roll(ApiVersion::V2) => "release_v2",
            Self::RollBatch => "release_batch",
            Self::Metadata => "metadata",
            Self::HostKeyAttest | Self::TpmAttest | Self::FirstTpmAttest | Self::DomainAttest => "attest",
            Self::GetInfo => "info",
            Self::SigningCertificates => "signing_certificates",
        }
    }
}

/// The target of a request.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    pub(super) family: Family,
    /// The resource and its method, if the path names one.
    pub(super) resource: Option<(&'static Method, Endpoint)>,
}

impl Asked {
    pub(super) fn of(path: &str) -> Self {
        let path = path.to_ascii_lowercase();
        let found = RESOURCES.iter().find(|(known, ..)| *known == path);
        Self { family: Family::of(&path), resource: found.map(|(_, method, endpoint)| (method, *endpoint)) }
    }

    pub(super) fn is(self, endpoint: Endpoint) -> bool {
        self.resource.is_some_and(|(_, resource)| resource == endpoint)
    }

    /// The name in the metrics.
    pub(super) fn name(self) -> &'static str {
        self.resource.map_or(NO_RESOURCE, |(_, endpoint)| endpoint.name())
    }
}

/// The metrics name for paths without a resource.
const NO_RESOURCE: &str = "none";

/// All resource names in the metrics.
#[must_use]
pub(crate) fn resources() -> Vec<&'static str> {
    let mut names: Vec<_> = RESOURCES.iter().map(|(.., endpoint)| endpoint.name()).chain([NO_RESOURCE]).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// The two families of resources. Each has its own error format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Family {
    KeyProtection,
    Attestation,
}

impl Family {
    fn of(path: &str) -> Self {
        if path == "/attestation" || path.starts_with("/attestation/") {
            Self::Attestation
        } else {
            Self::KeyProtection
        }
    }

    pub(super) fn media_types(self) -> &'static [&'static str] {
        match self {
            Self::KeyProtection => &["application/xml", "text/xml"],
            Self::Attestation => &["application/json"],
        }
    }

    /// An HTTP-level error, before the protocol is involved.
    pub(super) fn error(self, code: Code, message: &str) -> Answer {
        match self {
            Self::KeyProtection => Answer::refused(&Refusal::new(code, message)),
            Self::Attestation => Answer::attestation_error(&ErrorReply::Error { status: code.status() }, message),
        }
    }
}

/// Checks the Content-Type of a body.
pub(super) fn acceptable(headers: &HeaderMap, media_types: &[&str]) -> Result<(), String> {
    let expected = || format!("the body has to be {} in UTF-8", media_types.join(" or "));
    let mut values = headers.get_all(CONTENT_TYPE).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return Err(expected()) };
    let value = value.to_str().map_err(|_| expected())?;
    let mut parts = value.split(';').map(str::trim);
    let media_type = parts.next().unwrap_or_default().to_ascii_lowercase();
    if !media_types.contains(&media_type.as_str()) {
        return Err(expected());
    }
    for parameter in parts {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let value = value.trim().trim_matches('"');
        if name.trim().eq_ignore_ascii_case("charset") && !value.eq_ignore_ascii_case("utf-8") {
            return Err(expected());
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::http::answer::{JSON, XML};
    use hyper::header::HeaderValue;

    fn content_type(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn content_types_are_judged_as_the_page_says() {
        let xml = Family::KeyProtection.media_types();
        for good in [
            "application/xml",
            "text/xml",
            "Text/XML; charset=UTF-8",
            "application/xml;charset=\"utf-8\"",
            "text/xml; a=b",
        ] {
            assert!(acceptable(&content_type(good), xml).is_ok(), "{good}");
        }
        for bad in ["application/json", "text/xml; charset=latin1", "text/xml; charset=utf-16", "", "text/xmlx"] {
            assert!(acceptable(&content_type(bad), xml).is_err(), "{bad}");
        }
        assert!(acceptable(&HeaderMap::new(), xml).is_err());
    }

    #[test]
    fn the_table_is_in_lower_case_and_has_no_path_twice() {
        for (at, (path, ..)) in RESOURCES.iter().enumerate() {
            assert_eq!(*path, path.to_ascii_lowercase());
            assert!(RESOURCES[..at].iter().all(|(other, ..)| other != path));
        }
    }

    #[test]
    fn errors_have_the_form_of_their_family() {
        let answer = Family::of("/attestation/nothing").error(Code::NotFound, "x");
        assert_eq!((answer.status, answer.media_type), (404, JSON));
        assert!(answer.body.starts_with(b"{\"__type\":\"ErrorReply:#"));
        let answer = Family::of("/attestations").error(Code::NotFound, "x");
        assert_eq!((answer.status, answer.media_type), (404, XML));
    }
}
