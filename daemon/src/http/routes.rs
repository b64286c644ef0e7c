//! Passes a request to its handler, and converts the handler's result into the response.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use claviger_protocol::attestation::{ErrorReply, OperationMode, ServiceInfoReply};
use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::payload::ApiVersion;
use claviger_protocol::work::Work;
use http_body_util::Full;
use hyper::body::{Body, Incoming};
use hyper::{Method, Request, Response};
use tokio::task::JoinHandle;
use tracing::{Instrument, error_span};

use super::answer::{Answer, JSON, PKCS7, XML};
use super::attestation;
use super::body::{BodyError, Pace, read_body};
use super::intake::{self, Taking};
use super::resource::{Asked, Endpoint, acceptable};
use super::server::{Origin, Peer};
use crate::admission::Dropped;
use crate::admission::bodies::{NoRoom, Room};
use crate::attest::issuing::Refused;
use crate::observe::metrics;
use crate::release::{self, batch, decide};
use crate::request::{Attempt, Caller, ClientCertificate, Network};
use crate::service::Service;
use crate::sys::id::request_id;

/// Seconds after which the sender of a refused request asks again, while the state of this node is too old.
const EXPIRED_RETRY: u16 = 5;

/// Answers a request to the service address.
///
/// The work runs in a separate task: a client that disconnects does not stop a release between its decision and its
/// audit line, and a panic affects only one request. A release that still waits for its turn notices the
/// disconnection and leaves the queue.
pub(crate) async fn serve(
    service: Arc<Service>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
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
    // All log lines of the request contain its id.
    let span = error_span!("request", request = id);
    if origin.as_ref().is_some_and(Origin::client_has_closed) {
        present.has_closed();
    }
    let work = answer(service.clone(), request, asked, attempt).instrument(span.clone());
    // This runs inside the work: its end wakes the connection, which need not wait for its turn if a host has proved
    // itself.
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
        // All resources of the request are free by now.
        hold_back(&service, origin.as_ref()).await;
    }
    Ok(answer.into_response(&id))
}

/// Delays the reply to a sender that exceeds its rate. The connection may be closed meanwhile to make room.
async fn hold_back(service: &Service, origin: Option<&Origin>) {
    let _waits = origin.map(Origin::reading);
    if let Some(origin) = origin.filter(|origin| !origin.is_proved()) {
        origin.dismiss();
    }
    service.admission.hold_back().await;
}

/// A request that is answered without identifying its sender.
enum Quick {
    /// The reply is nearly free.
    Answer(Answer),
    /// The metadata document has to be signed first.
    Unsigned,
}

/// Handles requests that need no separate task: documents, and errors that are found before the body. `None`: the
/// request needs a task.
fn quick(service: &Service, asked: Asked, request: &Request<Incoming>) -> Option<Quick> {
    let family = asked.family;
    let Some((method, endpoint)) = asked.resource else {
        return Some(Quick::Answer(family.error(Code::NotFound, "there is no such resource")));
    };
    // HEAD is GET without the body, which hyper omits.
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
        Endpoint::GetInfo => Answer::ok(JSON, information(attestation::mode(service))),
        _ => {
            let message = acceptable(request.headers(), family.media_types()).err()?;
            family.error(Code::UnsupportedMediaType, &message)
        }
    };
    Some(Quick::Answer(document))
}

/// The reply to such a request, limited by the rate of its address. `None`: within the rate, and more work is needed.
/// Beyond the rate, `GetInfo`, which load balancers use, is delayed, and everything else is refused.
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

/// The service information, which is public.
fn information(mode: OperationMode) -> Bytes {
    static BY_HOST_KEY: LazyLock<Bytes> =
        LazyLock::new(|| ServiceInfoReply::new(OperationMode::HostKey).to_json().into());
    static BY_TPM: LazyLock<Bytes> = LazyLock::new(|| ServiceInfoReply::new(OperationMode::Tpm).to_json().into());
    match mode {
        OperationMode::Tpm => BY_TPM.clone(),
        _ => BY_HOST_KEY.clone(),
    }
}

/// Starts a task for the work on a request. The waiting future does not contain the work's future, because there may
/// be thousands of waiting ones.
fn spawn(work: impl Future<Output = Answer> + Send + 'static) -> JoinHandle<Answer> {
    tokio::spawn(work)
}

/// The reply to a request that failed before it was read, recorded and counted like any other decision: its task
/// panicked (500), or there was no memory (503).
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
            attestation::refuse(service, attempt, refused).await
        }
        _ => asked.family.error(refusal.code, &refusal.message),
    }
}

async fn answer(service: Arc<Service>, request: Request<Incoming>, asked: Asked, mut attempt: Attempt) -> Answer {
    let family = asked.family;
    if attempt.caller().is_gone() || service.admission.is_pressed() && attempt.caller().may_be_gone() {
        // The client probably reads no reply, so do not spend work on it.
        metrics::queue_dropped(Dropped::Left.as_str());
        return family.error(Code::ServiceUnavailable, "the caller went away");
    }
    let endpoint = match asked.resource {
        Some((_, Endpoint::Metadata)) => return metadata(&service).await,
        Some((_, endpoint)) => endpoint,
        // Already answered above.
        None => return family.error(Code::NotFound, "there is no such resource"),
    };
    if let Some(refused) = attestation::refused_unread(&service, endpoint) {
        return attestation::refuse_unread(&service, announced(&request), refused, &attempt).await;
    }
    if let Some(why) = service.registry.currency().why_expired() {
        let refusal = Refusal { retry_after: Some(EXPIRED_RETRY), ..Refusal::new(Code::ServiceUnavailable, why) };
        return refuse(&service, asked, &attempt, refusal).await;
    }
    // Held until the work for the request is done, even if the client no longer waits.
    let origin = request.extensions().get::<Origin>().cloned();
    let room = match room_for(&service, &request, origin.as_ref()) {
        Ok(room) => Arc::new(room),
        // The service is the cause, so it counts like other failed releases or attestations.
        Err(_) => return refuse(&service, asked, &attempt, intake::no_room()).await,
    };
    attempt.hold_body_in(room.clone());
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
        _ => attestation::attest(&service, endpoint, &body, attempt).await,
    };
    drop(body);
    let cut = origin.map(|origin| origin.cutter());
    Answer { body: room.for_answer(answer.body, move || cut.iter().for_each(|cut| cut())), ..answer }
}

/// Memory for the beginning of a request's body.
fn room_for(service: &Service, request: &Request<Incoming>, origin: Option<&Origin>) -> Result<Room, NoRoom> {
    let address = request.extensions().get::<Peer>().map(|peer| peer.0.ip());
    let network = Network::of(address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)));
    service.bodies.open(network, origin.map_or(0, Origin::connection))
}

/// Reads a request's body within its memory.
///
/// # Errors
/// The refusal if the body is too large, too slow or invalid, or if there is no memory.
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
    let waits = || origin.map_or(Duration::ZERO, Origin::waits);
    let waited = waits();
    let taking = match endpoint {
        Endpoint::RollBatch => Taking::batch(room, service, attempt),
        Endpoint::Roll(_) => Taking::single(room),
        _ => Taking::attestation(room, service, attempt),
    };
    let mut taking = taking.sent_on(origin);
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
                // Also charge for discarded bytes, which are read so that the sender gets the reply.
                service.admission.charge_stranger(attempt, intake::discarded(announced), Work::default());
            }
            return Err(refusal);
        }
    };
    attempt.was_kept_waiting(waits().saturating_sub(waited));
    Ok(body)
}

/// The length of a body, from its header.
fn announced(request: &Request<Incoming>) -> Option<u64> {
    request.body().size_hint().exact()
}

/// The metadata document, which HSMs may have to sign first.
async fn metadata(service: &Service) -> Answer {
    match service.registry.keys().metadata(&service.cluster).await {
        Ok(document) => Answer::ok(XML, document),
        Err(refusal) => Answer::refused(&refusal),
    }
}

/// Handles a release.
async fn roll(service: &Service, api: ApiVersion, body: &[u8], mut attempt: Attempt) -> Answer {
    let result = release::roll(service, &service.cluster, api, body, &mut attempt).await;
    Answer::release(decide(service, api, &attempt, result).await).for_sender(attempt.known)
}

/// Handles several releases. Each item was decided separately; a refusal of the whole request is decided here.
async fn roll_batch(service: &Arc<Service>, body: &[u8], mut attempt: Attempt) -> Answer {
    let answer = match batch::roll(service, &service.cluster, body, &mut attempt).await {
        Ok(results) => Answer::ok(XML, claviger_protocol::batch::to_xml(&results)),
        Err(refusal) => Answer::release(decide(service, ApiVersion::V2, &attempt, Err(refusal)).await),
    };
    answer.for_sender(attempt.known)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::http::server::{Limits, Listener, run};
    use hyper::service::service_fn;
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpSocket, TcpStream};

    /// Time limit of every wait.
    const LONG: Duration = Duration::from_secs(60);
    const ATTEST: &str = "/attestation/v2.0/hostkeyattest";
    const ROLL: &str = "/keyprotection/service/v2.0/rolltransportkey";

    /// Serves on a port of its own.
    fn served(service: Arc<Service>) -> SocketAddr {
        let listener = Listener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = listener.local_addr();
        let limits = Limits::from(&service.config.load().server);
        let handler = service_fn(move |request| serve(service.clone(), request));
        tokio::spawn(run(listener, None, limits, handler, std::future::pending()));
        address
    }

    /// Sends a request from an address of this machine.
    async fn send(from: [u8; 4], to: SocketAddr, path: &str, media_type: &str, body: &str) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((from, 0))).unwrap();
        let mut stream = socket.connect(to).await.unwrap();
        let length = body.len();
        let head = format!("Host: t\r\nContent-Type: {media_type}\r\nContent-Length: {length}");
        stream.write_all(format!("POST {path} HTTP/1.1\r\n{head}\r\n\r\n{body}").as_bytes()).await.unwrap();
        stream
    }

    /// The status of a reply.
    async fn status(mut stream: TcpStream) -> String {
        let mut head = [0; 12];
        tokio::time::timeout(LONG, stream.read_exact(&mut head)).await.unwrap().unwrap();
        String::from_utf8_lossy(&head[9..]).into_owned()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn strangers_who_wait_for_their_turn_keep_neither_memory_nor_turns_from_others() {
        let folder = tempfile::tempdir().unwrap();
        let service = crate::service::testing::service_in(folder.path(), |config| {
            (config.server.body_memory_mib, config.server.body_memory_per_address_mib) = (1, 0);
            config.release.deadline_ms = LONG.as_millis() as u64;
        });
        let address = served(service.clone());
        // All turns of strangers are taken.
        let mut turns = Vec::new();
        let elsewhere = Attempt::new(String::new());
        while let Ok(turn) =
            tokio::time::timeout(Duration::from_millis(100), service.admission.strangers_turn(&elsewhere, b"")).await
        {
            turns.push(turn.unwrap());
        }
        let mut waiting = Vec::new();
        for number in 0..40 {
            waiting.push(send([127, 0, 0, 2 + number % 2], address, ATTEST, JSON, "{}").await);
        }
        let full = async {
            while service.bodies.used().0 < service.bodies.used().1 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LONG, full).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        // The release of another address is read, and so is its attestation, before all those that came earlier.
        assert!(service.bodies.has_room());
        assert_eq!(status(send([127, 0, 0, 4], address, ROLL, XML, "<x/>").await).await, "400");
        let attestation = send([127, 0, 0, 4], address, ATTEST, JSON, "{}").await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(turns);
        assert_eq!(status(attestation).await, "400");
        let mut gave_way = 0;
        for stream in waiting {
            let status = status(stream).await;
            gave_way += usize::from(status == "503");
            assert!(["400", "503"].contains(&&*status), "{status}");
        }
        assert!(gave_way > 0);
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
        // The senders are unknown, so they are counted together.
        assert!(crate::service::testing::trail(&service).is_empty());
        service.audit.write_summary().await;
        let line = crate::service::testing::trail(&service).pop().unwrap();
        let outcomes = serde_json::json!({
            "InternalErrorException": 2, "ErrorReply": 1, "ServiceUnavailableException": 1, "UnavailableErrorReply": 1,
        });
        assert_eq!((&line["event"], &line["outcomes"]), (&"refusals".into(), &outcomes), "{line}");
        assert_eq!(line["requests"], serde_json::json!(["0", "1", "2", "x", "x"]));
    }
}
