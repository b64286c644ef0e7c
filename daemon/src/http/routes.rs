//! URL → handler, errors → status: the protocol's resources in one table.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use bytes::Bytes;
use claviger_protocol::attestation::{ErrorReply, OperationMode, ServiceInfoReply};
use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::payload::ApiVersion;
use claviger_protocol::request::RollResponse;
use claviger_protocol::work::Work;
use http_body_util::Full;
use hyper::body::{Body, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, Response, StatusCode};
use tokio::task::JoinHandle;
use tracing::{Instrument, error_span};

use crate::admission::Dropped;
use crate::admission::bodies::{NoRoom, Room};
use crate::attest::host_key;
use crate::attest::issuing::Refused;
use crate::attest::tpm;
use crate::config::AttestMode;
use crate::http::body::{BodyError, Pace, read_body};
use crate::http::intake::{self, MAX_BODY, Taking};
use crate::http::server::{Origin, Peer};
use crate::observe::audit::{Decision, NOT_RECORDED, SUCCESS};
use crate::observe::log_throttle::Throttle;
use crate::observe::metrics;
use crate::registry::issued::IssuedFor;
use crate::release::batch;
use crate::release::{self, decide};
use crate::request::{Attempt, Caller, ClientCertificate, Network};
use crate::service::Service;
use crate::sys::clock::unix_now;
use crate::sys::id::request_id;

/// Seconds after which a caller that was told 429 or 503 may come again, where nothing better is known.
const RETRY_AFTER_SECONDS: u16 = 1;
/// The header that carries the request's id.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const XML: &str = "application/xml; charset=utf-8";
const JSON: &str = "application/json; charset=utf-8";
const PKCS7: &str = "application/x-pkcs7-certificates";

/// What a resource does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Endpoint {
    Roll(ApiVersion),
    RollBatch,
    Metadata,
    HostKeyAttest,
    TpmAttest,
    /// TPM mode with the first version of the protocol, whose Context is not published.
    FirstTpmAttest,
    /// Attestation by Active Directory, which is not served.
    DomainAttest,
    GetInfo,
    SigningCertificates,
}

/// Every resource, in lower case: paths are matched without regard to case.
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
    /// What it is called in the metrics.
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

/// What a path asks for.
#[derive(Clone, Copy)]
struct Asked {
    family: Family,
    /// The resource and its method, if there is one.
    resource: Option<(&'static Method, Endpoint)>,
}

impl Asked {
    fn of(path: &str) -> Self {
        let path = path.to_ascii_lowercase();
        let found = RESOURCES.iter().find(|(known, ..)| *known == path);
        Self { family: Family::of(&path), resource: found.map(|(_, method, endpoint)| (method, *endpoint)) }
    }

    fn is(self, endpoint: Endpoint) -> bool {
        self.resource.is_some_and(|(_, resource)| resource == endpoint)
    }

    /// What it is called in the metrics.
    fn name(self) -> &'static str {
        self.resource.map_or(NO_RESOURCE, |(_, endpoint)| endpoint.name())
    }
}

/// What a path is called in the metrics that names no resource.
const NO_RESOURCE: &str = "none";

/// What everything is called that can be asked for.
#[must_use]
pub fn resources() -> Vec<&'static str> {
    let mut names: Vec<_> = RESOURCES.iter().map(|(.., endpoint)| endpoint.name()).chain([NO_RESOURCE]).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// The two families of resources; each has its own form of errors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Family {
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

    fn media_types(self) -> &'static [&'static str] {
        match self {
            Self::KeyProtection => &["application/xml", "text/xml"],
            Self::Attestation => &["application/json"],
        }
    }

    /// An error that is about HTTP and not yet about the protocol.
    fn error(self, code: Code, message: &str) -> Answer {
        match self {
            Self::KeyProtection => Answer::refused(&Refusal::new(code, message)),
            Self::Attestation => Answer::attestation_error(&ErrorReply::Error { status: code.status() }, message),
        }
    }
}

/// What a handler gives back.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) media_type: &'static str,
    pub(crate) body: Bytes,
    pub(crate) allow: Option<Method>,
    /// Seconds, for 429 and 503.
    pub(crate) retry_after: u16,
    /// Whether it shows that a host has sent the request, or that nobody knows who did; `None`: neither.
    pub(crate) proved: Option<bool>,
}

impl Answer {
    pub(crate) fn ok(media_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self { status: 200, media_type, body: body.into(), allow: None, retry_after: RETRY_AFTER_SECONDS, proved: None }
    }

    fn release(result: Result<RollResponse, Refusal>) -> Self {
        match result {
            Ok(response) => Self::ok(XML, response.to_xml()),
            Err(refusal) => Self::refused(&refusal),
        }
    }

    fn refused(refusal: &Refusal) -> Self {
        let retry_after = refusal.retry_after.unwrap_or(RETRY_AFTER_SECONDS);
        Self { status: refusal.code.status(), retry_after, ..Self::ok(XML, refusal.to_xml()) }
    }

    fn attestation_error(reply: &ErrorReply, message: &str) -> Self {
        Self { status: reply.status(), ..Self::ok(JSON, reply.to_json(message)) }
    }

    /// The same, as the answer to a request whose sender is `known` as a host or not.
    fn for_sender(self, known: bool) -> Self {
        let proved = match (known, self.status) {
            (true, 200) => Some(true),
            (true, _) => None,
            // No room, or no HSM: that says nothing of the sender.
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

/// Answers one request to the service address.
///
/// The work is a task of its own: a caller that goes away does not stop a release between its decision and its audit
/// line, and a panic costs one request. A release that still waits for its turn notices, and leaves the queue.
pub async fn serve(service: Arc<Service>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let id = request_id();
    let asked = Asked::of(request.uri().path());
    let address = request.extensions().get::<Peer>().map(|peer| peer.0.ip());
    let origin = request.extensions().get::<Origin>().cloned();
    let quick = match quick(&service, asked, &request) {
        Some(quick) => rationed(&service, asked, address, origin.as_ref(), quick).await,
        None => None,
    };
    if let Some(answer) = quick {
        metrics::response(asked.name(), answer.status);
        return Ok(answer.into_response(&id));
    }
    let client = request.extensions().get::<Arc<ClientCertificate>>().cloned();
    let (caller, present) = Caller::new();
    let mut attempt = Attempt::new(id.clone()).sent_from(address).asked_by(caller).with_client(client);
    attempt.answer_within(service.config.load().release.deadline());
    // What is logged of the request has its id, wherever it is logged.
    let span = error_span!("request", request = id);
    if origin.as_ref().is_some_and(Origin::client_has_closed) {
        present.has_closed();
    }
    let work = answer(service.clone(), request, asked, attempt).instrument(span.clone());
    // Within the work: its end wakes the connection, which need not wait for its turn when a host has proved itself.
    let judge = origin.clone();
    let work = async move {
        let answer = work.await;
        if let (Some(origin), Some(proved)) = (judge, answer.proved) {
            origin.judge(proved);
        }
        answer
    };
    let mut work = match &origin {
        Some(origin) if !origin.is_proved() => spawn(origin.charged(work)),
        _ => spawn(work),
    };
    let done = match &origin {
        None => work.await,
        Some(origin) => tokio::select! {
            biased;
            done = &mut work => done,
            () = origin.client_closes() => {
                present.has_closed();
                work.await
            }
        },
    };
    let answer = match done {
        Ok(answer) => answer,
        Err(error) => {
            span.in_scope(|| tracing::error!(%error, "a request failed"));
            let attempt = Attempt::new(id.clone()).sent_from(address);
            refuse(&service, asked, &attempt, Refusal::internal()).await
        }
    };
    metrics::response(asked.name(), answer.status);
    if answer.status == 429 {
        // Everything that the request held is free by now.
        hold_back(&service, origin.as_ref()).await;
    }
    Ok(answer.into_response(&id))
}

/// Holds back the answer to a caller that asks too fast. Meanwhile its connection may be closed to make room.
async fn hold_back(service: &Service, origin: Option<&Origin>) {
    let _waits = origin.map(Origin::reading);
    if let Some(origin) = origin.filter(|origin| !origin.is_proved()) {
        origin.dismiss();
    }
    service.admission.hold_back().await;
}

/// A request that needs no look at who asks.
enum Quick {
    /// Its answer costs next to nothing.
    Answer(Answer),
    /// The metadata document has to be signed first.
    Unsigned,
}

/// What is answered without a task of its own: documents, and what is wrong with a request before its body. `None`: it is work.
fn quick(service: &Service, asked: Asked, request: &Request<Incoming>) -> Option<Quick> {
    let family = asked.family;
    let Some((method, endpoint)) = asked.resource else {
        return Some(Quick::Answer(family.error(Code::NotFound, "there is no such resource")));
    };
    // HEAD is GET without the body, which hyper leaves out.
    let with = if request.method() == Method::HEAD { &Method::GET } else { request.method() };
    if with != method {
        let answer = family.error(Code::MethodNotAllowed, &format!("this resource has only {method}"));
        return Some(Quick::Answer(Answer { allow: Some(method.clone()), ..answer }));
    }
    let document = match endpoint {
        Endpoint::Metadata => match service.registry.keys().signed_metadata() {
            Some(document) => Answer::ok(XML, document),
            None => return Some(Quick::Unsigned),
        },
        Endpoint::SigningCertificates => Answer::ok(PKCS7, service.registry.signers().published()),
        Endpoint::GetInfo => Answer::ok(JSON, information(mode(service))),
        _ => {
            let message = acceptable(request.headers(), family.media_types()).err()?;
            family.error(Code::UnsupportedMediaType, &message)
        }
    };
    Some(Quick::Answer(document))
}

/// The answer to such a request, as far as its address may have it. `None`: it may, and there is work to do for it. Beyond the
/// rate, information, which load balancers ask for, comes a moment later, and anything else is refused.
async fn rationed(
    service: &Service,
    asked: Asked,
    address: Option<IpAddr>,
    origin: Option<&Origin>,
    quick: Quick,
) -> Option<Answer> {
    let within = address.map_or(Ok(()), |address| service.admission.document(Network::of(address)));
    let Err(retry_after) = within else {
        return match quick {
            Quick::Answer(answer) => Some(answer),
            Quick::Unsigned => None,
        };
    };
    hold_back(service, origin).await;
    match quick {
        Quick::Answer(answer) if asked.is(Endpoint::GetInfo) => Some(answer),
        _ => {
            let refusal = asked.family.error(Code::TooManyRequests, "this address asks for too much; try again");
            Some(Answer { retry_after, ..refusal })
        }
    }
}

/// What the service is, as it is told to everybody.
fn information(mode: OperationMode) -> Bytes {
    static BY_HOST_KEY: LazyLock<Bytes> =
        LazyLock::new(|| ServiceInfoReply::new(OperationMode::HostKey).to_json().into());
    static BY_TPM: LazyLock<Bytes> = LazyLock::new(|| ServiceInfoReply::new(OperationMode::Tpm).to_json().into());
    match mode {
        OperationMode::Tpm => BY_TPM.clone(),
        _ => BY_HOST_KEY.clone(),
    }
}

/// Makes a task of the work on a request. The future is never part of the one that waits for the task, which there may be
/// thousands of.
fn spawn(work: impl Future<Output = Answer> + Send + 'static) -> JoinHandle<Answer> {
    tokio::spawn(work)
}

/// The answer to a request that the service could not even read, recorded and counted like any other decision: a task that
/// panicked (500), no room (503).
async fn refuse(service: &Service, asked: Asked, attempt: &Attempt, refusal: Refusal) -> Answer {
    match asked.resource.map(|(_, endpoint)| endpoint) {
        Some(Endpoint::Roll(api)) => Answer::release(decide(service, api, attempt, Err(refusal)).await),
        Some(Endpoint::RollBatch) => Answer::release(decide(service, ApiVersion::V2, attempt, Err(refusal)).await),
        Some(Endpoint::HostKeyAttest | Endpoint::TpmAttest | Endpoint::FirstTpmAttest | Endpoint::DomainAttest) => {
            let reply = match refusal.code {
                Code::ServiceUnavailable => ErrorReply::Unavailable,
                code => ErrorReply::Error { status: code.status() },
            };
            let refused = Refused { retry_after: refusal.retry_after, ..Refused::new(reply, refusal.message) };
            finish_attestation(service, attempt, Err(refused)).await
        }
        _ => asked.family.error(refusal.code, &refusal.message),
    }
}

async fn answer(service: Arc<Service>, request: Request<Incoming>, asked: Asked, mut attempt: Attempt) -> Answer {
    let family = asked.family;
    if attempt.caller().is_gone() || service.admission.is_pressed() && attempt.caller().may_be_gone() {
        // Most likely nobody will read it: what a client takes back is not to cost more than that.
        metrics::queue_dropped(Dropped::Left.as_str());
        return family.error(Code::ServiceUnavailable, "the caller went away");
    }
    let endpoint = match asked.resource {
        Some((_, Endpoint::Metadata)) => return metadata(&service).await,
        Some((_, endpoint)) => endpoint,
        // Answered before.
        None => return family.error(Code::NotFound, "there is no such resource"),
    };
    if let Some(refused) = refused_unread(&service, endpoint) {
        return refuse_unread(&service, &request, refused, &attempt).await;
    }
    // Held until the request is answered, whether its client waits for that or not.
    let origin = request.extensions().get::<Origin>().cloned();
    let room = match room_for(&service, &request, origin.as_ref()) {
        Ok(room) => room,
        // The service's own doing, so it counts like any other release or attestation that failed.
        Err(_) => return refuse(&service, asked, &attempt, intake::no_room()).await,
    };
    let body = match body_of(&service, request, endpoint, origin.as_ref(), &room, &mut attempt).await {
        Ok(body) => body,
        Err(refusal) => {
            return match refusal.code {
                Code::ServiceUnavailable | Code::HealthCertificate | Code::TooManyRequests => {
                    refuse(&service, asked, &attempt, refusal).await
                }
                code => family.error(code, &refusal.message).for_sender(attempt.known),
            };
        }
    };
    let answer = match endpoint {
        Endpoint::Roll(api) => roll(&service, api, &body, attempt).await,
        Endpoint::RollBatch => roll_batch(&service, &body, attempt).await,
        _ => attest(&service, endpoint, &body, attempt).await,
    };
    drop(body);
    Answer { body: room.for_answer(answer.body), ..answer }
}

/// Room for the beginning of a request's body.
fn room_for(service: &Service, request: &Request<Incoming>, origin: Option<&Origin>) -> Result<Room, NoRoom> {
    let address = request.extensions().get::<Peer>().map(|peer| peer.0.ip());
    let network = Network::of(address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)));
    service.bodies.open(network, origin.map_or(0, Origin::connection))
}

/// Reads a request's body, for which there is room as far as it has come.
///
/// # Errors
/// What a request is refused with whose body is too large, too slow or broken, or finds no room.
async fn body_of(
    service: &Service,
    request: Request<Incoming>,
    endpoint: Endpoint,
    origin: Option<&Origin>,
    room: &Room,
    attempt: &mut Attempt,
) -> Result<Bytes, Refusal> {
    let _reading = origin.map(Origin::reading);
    let config = service.config.load();
    let pace = Pace { within: config.server.body_timeout(), least: config.server.body_rate };
    let mut taking = match endpoint {
        Endpoint::RollBatch => Taking::batch(room, service, attempt),
        Endpoint::Roll(_) => Taking::single(room),
        _ => Taking::attestation(room, service, attempt),
    };
    let most = taking.most();
    let announced = announced(&request).unwrap_or(most);
    if let Err(refusal) = taking.announced(announced) {
        drop(taking);
        service.admission.charge_stranger(attempt, 0, Work::default());
        return Err(refusal);
    }
    let read = tokio::select! {
        read = read_body(request.into_body(), most, pace, &mut taking) => read,
        () = room.summoned() => return Err(intake::no_room()),
    };
    let refused = |error: BodyError, taking: Taking<'_>| {
        intake::count(error);
        match error {
            BodyError::TooLarge => Refusal::new(Code::RequestTooLarge, format!("the body is larger than {most} bytes")),
            BodyError::Timeout => Refusal::new(Code::RequestTimeout, error.to_string()),
            BodyError::Broken => Refusal::new(Code::InvalidRequest, error.to_string()),
            BodyError::NotTaken => taking.refusal(),
        }
    };
    let body = match read {
        Ok(body) => body,
        Err(error) => {
            let refusal = refused(error, taking);
            if !attempt.known && refusal.code != Code::ServiceUnavailable {
                // Also for what is read and thrown away, so that its sender gets to read the answer.
                service.admission.charge_stranger(attempt, intake::discarded(announced), Work::default());
            }
            return Err(refusal);
        }
    };
    room.arrived().map_err(|_| intake::no_room())?;
    Ok(body)
}

/// The length of a body, where its header says it.
fn announced(request: &Request<Incoming>) -> Option<u64> {
    request.body().size_hint().exact()
}

/// The metadata document, for which HSMs may have to sign.
async fn metadata(service: &Service) -> Answer {
    match service.registry.keys().metadata(&service.cluster).await {
        Ok(document) => Answer::ok(XML, document),
        Err(refusal) => Answer::refused(&refusal),
    }
}

/// A release, answered.
async fn roll(service: &Service, api: ApiVersion, body: &[u8], mut attempt: Attempt) -> Answer {
    let result = release::roll(service, &service.cluster, api, body, &mut attempt).await;
    Answer::release(decide(service, api, &attempt, result).await).for_sender(attempt.known)
}

/// Many releases, answered. The items were decided one by one; a refusal of the whole request is decided here.
async fn roll_batch(service: &Arc<Service>, body: &[u8], mut attempt: Attempt) -> Answer {
    let answer = match batch::roll(service, &service.cluster, body, &mut attempt).await {
        Ok(results) => Answer::ok(XML, claviger_protocol::batch::to_xml(&results)),
        Err(refusal) => Answer::release(decide(service, ApiVersion::V2, &attempt, Err(refusal)).await),
    };
    answer.for_sender(attempt.known)
}

/// How hosts are to prove themselves now.
fn mode(service: &Service) -> OperationMode {
    match service.config.load().attest.mode {
        AttestMode::HostKey => OperationMode::HostKey,
        AttestMode::Tpm => OperationMode::Tpm,
    }
}

/// What an attestation is refused with whatever its body says: its endpoint is not that of the configured mode. The mode is
/// judged before the payload, so the body is not read.
fn refused_unread(service: &Service, endpoint: Endpoint) -> Option<Refused> {
    let expected = mode(service);
    match (expected, endpoint) {
        (_, Endpoint::Roll(_) | Endpoint::RollBatch)
        | (OperationMode::HostKey, Endpoint::HostKeyAttest)
        | (OperationMode::Tpm, Endpoint::TpmAttest) => None,
        (OperationMode::Tpm, Endpoint::FirstTpmAttest) => {
            let message = "the Context of version 1.0 is not published; use /Attestation/v2.0/attest";
            Some(Refused::new(ErrorReply::Payload, message))
        }
        _ => {
            let what = if expected == OperationMode::Tpm { "TPMs" } else { "host keys" };
            let reply = ErrorReply::OperationMode { expected };
            Some(Refused::new(reply, format!("this service attests {what}")))
        }
    }
}

/// Refuses such an attestation. It is charged to its sender's address like a body that was read.
async fn refuse_unread(service: &Service, request: &Request<Incoming>, refused: Refused, attempt: &Attempt) -> Answer {
    let refused = service.admission.stranger_may_attest(attempt).map_or_else(Refused::from, |()| refused);
    let length = announced(request).and_then(|length| usize::try_from(length).ok()).unwrap_or(MAX_BODY);
    service.admission.charge_stranger(attempt, length.min(MAX_BODY), Work::default());
    finish_attestation(service, attempt, Err(refused)).await
}

/// An attestation in the configured mode: decided, recorded, counted, answered.
async fn attest(service: &Service, endpoint: Endpoint, body: &[u8], mut attempt: Attempt) -> Answer {
    let result = match endpoint {
        Endpoint::TpmAttest => match tpm::attest(service, body, &mut attempt).await {
            Ok(tpm::Progress::Issued(issued)) => Ok((issued, false)),
            Ok(tpm::Progress::Continue(reply)) => {
                // Nothing was decided yet, and anybody may begin: it is neither recorded nor counted as an attestation.
                return Answer::ok(JSON, reply);
            }
            Err(refused) => Err(refused),
        },
        _ => host_key::attest(service, body, &mut attempt).await.map(|issued| (issued, true)),
    };
    // Nothing is awaited between this and the record, as in `decide`.
    let granted = result.and_then(|(issued, may_repeat)| {
        let (reply, unrecorded) = issued.confirm(service)?;
        let repeated = may_repeat && unrecorded.is_empty();
        Ok(Granted { answer: Answer::ok(JSON, reply.to_json()), unrecorded, repeated })
    });
    finish_attestation(service, &attempt, granted).await
}

/// An attestation that is granted.
struct Granted {
    answer: Answer,
    /// Those of its certificates that may be asked for again, and that the audit trail does not tell of yet.
    unrecorded: Vec<IssuedFor>,
    /// Whether the audit trail tells of all of them.
    repeated: bool,
}

/// The decision on an attestation: recorded, counted, answered.
async fn finish_attestation(service: &Service, attempt: &Attempt, result: Result<Granted, Refused>) -> Answer {
    let outcome = result.as_ref().map_or_else(|refused| refused.reply.name(), |_| SUCCESS);
    let what = match &result {
        Ok(granted) if granted.repeated => Decision::Repeated,
        _ => Decision::of(result.as_ref().err().map(|refused| refused.reply.status()), attempt.known),
    };
    let mut entry = attempt.entry("attest", outcome);
    if result.is_err() {
        // It may have been issued for a host that is not registered any more.
        entry.health_serial = None;
    }
    let recorded = service.audit.decided(&entry, what, attempt.deadline()).await;
    let (outcome, answer) = match result {
        _ if !recorded => {
            let reply = ErrorReply::Unavailable;
            entry.outcome = reply.name().to_owned();
            service.audit.count(&entry);
            (reply.name(), Answer::attestation_error(&reply, NOT_RECORDED))
        }
        Ok(Granted { answer, unrecorded, .. }) => {
            unrecorded.iter().for_each(|of| service.issued.recorded(of));
            note_identity(service, attempt);
            (SUCCESS, answer)
        }
        Err(Refused { reply, message, retry_after }) => {
            let answer = Answer::attestation_error(&reply, &message);
            (outcome, Answer { retry_after: retry_after.unwrap_or(answer.retry_after), ..answer })
        }
    };
    metrics::attestation(outcome, attempt.spent().total);
    answer.for_sender(attempt.known)
}

/// Remembers which identity key a host got certified, and says when it is another one than before.
fn note_identity(service: &Service, attempt: &Attempt) {
    static SAID: Throttle = Throttle::new();
    let Some(host) = &attempt.host else { return };
    let before = service.usage.attested(host, attempt.identity_key.as_deref(), unix_now());
    if let Some(before) = before {
        metrics::identity_changed();
        if let Some(unsaid) = SAID.due(Instant::now()) {
            tracing::warn!(
                host,
                before,
                now = attempt.identity_key,
                unsaid,
                "a host has another identity key than before"
            );
        }
    }
}

/// Every outcome an attestation can have.
#[must_use]
pub fn attestation_outcomes() -> Vec<&'static str> {
    let refusals = [
        ErrorReply::Error { status: 500 },
        ErrorReply::Payload,
        ErrorReply::Unauthorized,
        ErrorReply::OperationMode { expected: OperationMode::HostKey },
        ErrorReply::PolicyEvaluation { reasons: Vec::new() },
        ErrorReply::Rtpm { retryable: false },
        ErrorReply::TcgLogValidation,
        ErrorReply::Unavailable,
    ];
    [SUCCESS].into_iter().chain(refusals.iter().map(ErrorReply::name)).collect()
}

/// Judges the Content-Type of a body.
fn acceptable(headers: &HeaderMap, media_types: &[&str]) -> Result<(), String> {
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

    #[tokio::test]
    async fn a_request_that_panicked_is_on_record() {
        let (_folder, service) = crate::service::testing::service();
        for (number, (path, media_type)) in [
            ("/keyprotection/service/v1.0/rolltransportkey", XML),
            ("/keyprotection/service/v2.0/rolltransportkeys", XML),
            ("/attestation/v2.0/hostkeyattest", JSON),
        ]
        .into_iter()
        .enumerate()
        {
            let answer =
                refuse(&service, Asked::of(path), &Attempt::new(number.to_string()), Refusal::internal()).await;
            assert_eq!((answer.status, answer.media_type), (500, media_type));
        }
        let none = Refusal::internal();
        assert_eq!(
            refuse(&service, Asked::of("/attestation/getinfo"), &Attempt::new(String::new()), none).await.media_type,
            JSON
        );
        let no_room = || Refusal::new(Code::ServiceUnavailable, "no room");
        for path in ["/keyprotection/service/v2.0/rolltransportkey", "/attestation/v2.0/hostkeyattest"] {
            let answer = refuse(&service, Asked::of(path), &Attempt::new("x".to_owned()), no_room()).await;
            assert_eq!(answer.status, 503, "{path}");
        }
        // Nobody knows who asked: they are counted together.
        assert!(crate::service::testing::trail(&service).is_empty());
        service.audit.write_summary().await;
        let line = crate::service::testing::trail(&service).pop().unwrap();
        let outcomes = serde_json::json!({
            "InternalErrorException": 2, "ErrorReply": 1, "ServiceUnavailableException": 1, "UnavailableErrorReply": 1,
        });
        assert_eq!((&line["event"], &line["outcomes"]), (&"refusals".into(), &outcomes), "{line}");
        assert_eq!(line["requests"], serde_json::json!(["0", "1", "2", "x", "x"]));
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
