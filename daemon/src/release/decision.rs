//! The end of a release: its decision is confirmed, recorded in the audit trail, and counted, in this order.

use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::payload::ApiVersion;
use claviger_protocol::request::RollResponse;

use super::grant::Grant;
use crate::observe::audit::{Decision, NOT_RECORDED, SUCCESS};
use crate::observe::metrics::{self, Class};
use crate::request::Attempt;
use crate::service::Service;
use crate::sys::clock::unix_now;

/// Decides a release: confirms it, records it, then counts it. A release that cannot be recorded is refused.
///
/// # Errors
/// The refusal in `result`, the refusal of a grant that is no longer valid, or `ServiceUnavailableException` if the
/// decision cannot be recorded.
pub async fn decide(
    service: &Service,
    api: ApiVersion,
    attempt: &Attempt,
    result: Result<Grant, Refusal>,
) -> Result<RollResponse, Refusal> {
    // No change that an administrator has seen completed lies between this check and the record.
    let deciding = service.registry.decisions().deciding();
    let result = result.and_then(|grant| grant.confirm(service));
    let outcome = |result: &Result<RollResponse, Refusal>| match result {
        Ok(_) => SUCCESS,
        Err(refusal) => refusal.code.as_str(),
    };
    let what = Decision::of(result.as_ref().err().map(|refusal| refusal.code.status()), attempt.known);
    let mut entry = attempt.entry("release", outcome(&result));
    entry.api = Some(api.as_str());
    if result.is_err() {
        // The digest may be from a grant that is no longer valid.
        entry.egress = None;
    }
    let recorded = service.audit.decided(&entry, what, attempt.deadline());
    drop(deciding);
    let decided = if recorded.await {
        result
    } else {
        let refusal = Refusal::new(Code::ServiceUnavailable, NOT_RECORDED);
        entry.outcome = refusal.code.as_str().to_owned();
        service.audit.count(&entry);
        Err(refusal)
    };
    if decided.is_ok() {
        service.usage.released(attempt.host.as_deref(), &attempt.keys, unix_now());
    }
    let class = match &decided {
        Ok(_) => Class::Success,
        Err(refusal) if refusal.code.status() < 500 => Class::Refused,
        Err(_) => Class::Failed,
    };
    let spent = attempt.spent();
    service.history.released(class, spent.total, spent.hsm.is_some());
    metrics::release(outcome(&decided), api.as_str(), class, spent, attempt.certificate_used.clone());
    decided
}

/// All possible outcomes of a release, so that each has a metric series from the start.
#[must_use]
pub fn outcomes() -> Vec<&'static str> {
    let refusals = [
        Code::InvalidRequest,
        Code::InvalidProtector,
        Code::InvalidWrapping,
        Code::UnsupportedAlgorithm,
        Code::HealthCertificate,
        Code::TooManyRequests,
        Code::ServiceUnavailable,
        Code::Internal,
    ];
    [SUCCESS].into_iter().chain(refusals.into_iter().map(Code::as_str)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_a_known_host_does_has_a_line_of_its_own() {
        let (_folder, service) = crate::service::testing::service();
        let refused = async |host: Option<&str>, code: Code| {
            let mut attempt = Attempt::new("r".to_owned());
            attempt.host = host.map(str::to_owned);
            attempt.known = host.is_some();
            decide(&service, ApiVersion::V2, &attempt, Err(Refusal::new(code, "x"))).await.unwrap_err().code
        };
        for code in Code::ALL {
            assert_eq!(refused(None, code).await, code);
        }
        assert!(crate::service::testing::trail(&service).is_empty());
        for code in [Code::TooManyRequests, Code::ServiceUnavailable] {
            assert_eq!(refused(Some("node"), code).await, code);
        }
        assert!(crate::service::testing::trail(&service).is_empty());
        for code in [Code::InvalidProtector, Code::InvalidWrapping, Code::HealthCertificate, Code::Internal] {
            assert_eq!(refused(Some("node"), code).await, code);
            let line = crate::service::testing::trail(&service).pop().unwrap();
            assert_eq!((&line["host"], &line["outcome"]), (&"node".into(), &code.as_str().into()));
            assert_eq!((&line["event"], &line["api"]), (&"release".into(), &"v2.0".into()));
        }
        service.audit.write_summary().await;
        let lines = crate::service::testing::trail(&service);
        let count = |host: &str| {
            let of =
                lines.iter().find(|line| line["event"] == "refusals" && line["host"].as_str().unwrap_or("") == host);
            of.unwrap()["count"].as_u64().unwrap()
        };
        assert_eq!((count(""), count("node"), lines.len()), (Code::ALL.len() as u64, 2, 4 + 2));
    }
}
