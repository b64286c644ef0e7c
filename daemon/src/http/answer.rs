//! The result of a handler, and its conversion into a response.

use bytes::Bytes;
use claviger_protocol::attestation::ErrorReply;
use claviger_protocol::error::Refusal;
use claviger_protocol::request::RollResponse;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Method, Response, StatusCode};

/// Default `Retry-After` in seconds for replies with 429 or 503.
const RETRY_AFTER_SECONDS: u16 = 1;

/// The header that carries the request's id.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

pub(super) const XML: &str = "application/xml; charset=utf-8";
pub(super) const JSON: &str = "application/json; charset=utf-8";
pub(super) const PKCS7: &str = "application/x-pkcs7-certificates";

/// The result of a handler.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) media_type: &'static str,
    pub(crate) body: Bytes,
    pub(crate) allow: Option<Method>,
    /// Seconds, for 429 and 503.
    pub(crate) retry_after: u16,
    /// Whether the reply proves that a host sent the request (`true`), or that the sender is unknown (`false`);
    /// `None`: neither.
    pub(crate) proved: Option<bool>,
}

impl Answer {
    pub(crate) fn ok(media_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self { status: 200, media_type, body: body.into(), allow: None, retry_after: RETRY_AFTER_SECONDS, proved: None }
    }

    pub(super) fn release(result: Result<RollResponse, Refusal>) -> Self {
        match result {
            Ok(response) => Self::ok(XML, response.to_xml()),
            Err(refusal) => Self::refused(&refusal),
        }
    }

    pub(super) fn refused(refusal: &Refusal) -> Self {
        let retry_after = refusal.retry_after.unwrap_or(RETRY_AFTER_SECONDS);
        Self { status: refusal.code.status(), retry_after, ..Self::ok(XML, refusal.to_xml()) }
    }

    pub(super) fn attestation_error(reply: &ErrorReply, message: &str) -> Self {
        Self { status: reply.status(), ..Self::ok(JSON, reply.to_json(message)) }
    }

    /// The same for a request whose sender is, or is not, `known` as a host.
    pub(super) fn for_sender(self, known: bool) -> Self {
        let proved = match (known, self.status) {
            (true, 200) => Some(true),
            (true, _) => None,
            // The service had no memory or no HSM, which says nothing about the sender.
            (false, 503) => None,
            (false, _) => Some(false),
        };
        Self { proved, ..self }
    }

    pub(crate) fn into_response(self, request: &str) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(self.body));
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.media_type));
        if let Ok(id) = HeaderValue::from_str(request) {
            headers.insert(REQUEST_ID, id);
        }
        if matches!(self.status, 429 | 503) {
            headers.insert(RETRY_AFTER, self.retry_after.into());
        }
        if let Some(method) = self.allow.and_then(|m| HeaderValue::from_str(m.as_str()).ok()) {
            headers.insert(ALLOW, method);
        }
        response
    }
}
