//! Refusals: a code, a message, and the error body that carries both (protocol page, section 2.5).

use std::fmt;

use crate::xml::{self, SERVICE_NS};

/// The error codes of the protocol. Each has one HTTP status.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Code {
    /// 400: the request does not follow the schema.
    InvalidRequest,
    /// 400: the protector does not follow the schema, is too large, or has a wrong signature.
    InvalidProtector,
    /// 400: a certificate or the chain of wrappings is invalid, or no wrapping is for this service.
    InvalidWrapping,
    /// 400: an algorithm or its parameters are not supported.
    UnsupportedAlgorithm,
    /// 403: the host did not prove its health.
    HealthCertificate,
    /// 404: the resource does not exist.
    NotFound,
    /// 405: the resource does not support this method.
    MethodNotAllowed,
    /// 408: the body did not arrive in time.
    RequestTimeout,
    /// 413: the body is too large.
    RequestTooLarge,
    /// 415: the body is not XML in UTF-8.
    UnsupportedMediaType,
    /// 429: this host sends too many requests.
    TooManyRequests,
    /// 503: no HSM could process the request in time, or the audit trail could not record the decision.
    ServiceUnavailable,
    /// 500: the service has an internal error.
    Internal,
}

impl Code {
    /// All codes, for tables that must be complete.
    pub const ALL: [Self; 13] = [
        Self::InvalidRequest,
        Self::InvalidProtector,
        Self::InvalidWrapping,
        Self::UnsupportedAlgorithm,
        Self::HealthCertificate,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::RequestTimeout,
        Self::RequestTooLarge,
        Self::UnsupportedMediaType,
        Self::TooManyRequests,
        Self::ServiceUnavailable,
        Self::Internal,
    ];

    /// The text of the `Code` element.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "InvalidRequestException",
            Self::InvalidProtector => "InvalidProtectorException",
            Self::InvalidWrapping => "InvalidWrappingException",
            Self::UnsupportedAlgorithm => "UnsupportedAlgorithmException",
            Self::HealthCertificate => "HealthCertificateException",
            Self::NotFound => "NotFoundException",
            Self::MethodNotAllowed => "MethodNotAllowedException",
            Self::RequestTimeout => "RequestTimeoutException",
            Self::RequestTooLarge => "RequestTooLargeException",
            Self::UnsupportedMediaType => "UnsupportedMediaTypeException",
            Self::TooManyRequests => "TooManyRequestsException",
            Self::ServiceUnavailable => "ServiceUnavailableException",
            Self::Internal => "InternalErrorException",
        }
    }

    /// The code's HTTP status.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::InvalidRequest | Self::InvalidProtector | Self::InvalidWrapping | Self::UnsupportedAlgorithm => 400,
            Self::HealthCertificate => 403,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::RequestTimeout => 408,
            Self::RequestTooLarge => 413,
            Self::UnsupportedMediaType => 415,
            Self::TooManyRequests => 429,
            Self::Internal => 500,
            Self::ServiceUnavailable => 503,
        }
    }
}

/// A refused request. The message helps a correct client and never reveals which secret step failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// The code.
    pub code: Code,
    /// One sentence for people.
    pub message: String,
    /// Seconds after which the client may retry, if known; only for [`Code::TooManyRequests`] and
    /// [`Code::ServiceUnavailable`]. It is sent as a header, not in the body.
    pub retry_after: Option<u16>,
}

impl Refusal {
    /// Creates a refusal.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after: None }
    }

    /// Adds the seconds after which the client may retry.
    #[must_use]
    pub fn retry_after(self, seconds: u16) -> Self {
        Self { retry_after: Some(seconds), ..self }
    }

    /// `InvalidRequestException`.
    #[must_use]
    pub fn request(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidRequest, message)
    }

    /// `InvalidProtectorException`.
    #[must_use]
    pub fn protector(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidProtector, message)
    }

    /// `InvalidWrappingException`.
    #[must_use]
    pub fn wrapping(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidWrapping, message)
    }

    /// `InternalErrorException`. The cause goes to the log, never into the reply.
    #[must_use]
    pub fn internal() -> Self {
        Self::new(Code::Internal, "the service failed to process the request; its log says why")
    }

    /// The `Error` body (namespace `S`).
    #[must_use]
    pub fn to_xml(&self) -> Vec<u8> {
        let mut out = format!("<?xml version=\"1.0\" encoding=\"utf-8\"?><Error xmlns=\"{SERVICE_NS}\">");
        self.write_content(&mut out);
        out.push_str("</Error>");
        out.into_bytes()
    }

    /// The content of an `Error` element.
    pub(crate) fn write_content(&self, out: &mut String) {
        out.push_str("<Code>");
        out.push_str(self.code.as_str());
        out.push_str("</Code><Message>");
        xml::escape_text(&self.message, out);
        out.push_str("</Message>");
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.message)
    }
}

impl std::error::Error for Refusal {}
