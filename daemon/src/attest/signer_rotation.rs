//! The attestation signer: the key that signs health certificates. The daemon generates and renews it. It creates a new
//! signer if a member of the cluster lacks the key, so that any single member can sign.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger_hsm::{Cluster, Failure, HsmError, KeyId, KeyRef, KeyUsage, MemberState, NewKey, standstill};
use claviger_protocol::certificate::build::BuildError;
use claviger_protocol::health::{self, LIFETIME_SECONDS};
use claviger_protocol::rsa_key::{KeyError, RsaPrivateKey, RsaPublicKey};

use crate::nodes::turn::Turn;
use crate::registry::error::ChangeError;
use crate::service::Service;
use crate::signing::{self, OWN_DEADLINE, private_parts};
use crate::store::{BoardError, NewSigner, StateError};
use crate::sys::clock::unix_now;

/// Validity of a signer's certificate, and the time before its end at which a new signer replaces it (seconds).
const VALIDITY: i64 = 365 * 24 * 3600;
const RENEWAL: i64 = 30 * 24 * 3600;
/// How often the daemon checks whether the signer is due for renewal, and whether the members have its key.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// The pause after a failed attempt.
const RETRY: Duration = Duration::from_secs(2);
/// Timeout of the question whether a member has a key.
const PATIENCE: Duration = Duration::from_secs(5);
/// Number of consecutive checks at which a member has to lack the key before a new signer is made: a vendor's replication of
/// keys takes a moment.
const LOOKS: u32 = 2;
/// The first and the longest pause between signers that are created because a member lacks the key. The pause doubles:
/// a member that never accepts a key must not cause ever more keys on the other members.
const FIRST_PAUSE: Duration = Duration::from_secs(60);
const LONGEST_PAUSE: Duration = Duration::from_secs(24 * 3600);
/// Longest time for which one node keeps the others from making a signer.
const TURN: Duration = Duration::from_secs(60);
const BITS: u32 = 2048;

/// Why no new signer was created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SignerError {
    /// The HSMs cannot generate or import the key, or cannot sign with it.
    #[error("the HSMs: {0}")]
    Hsm(#[from] Failure),
    /// A generated key is invalid.
    #[error("the key: {0}")]
    Key(#[from] KeyError),
    /// The certificate cannot be built.
    #[error("the certificate: {0}")]
    Build(#[from] BuildError),
    /// The state cannot be written.
    #[error("the state: {0}")]
    State(#[from] ChangeError),
    /// It is not known whether another node makes a signer.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// Another node makes a signer.
    #[error("another node makes an attestation signer now; try again")]
    OthersTurn,
}

/// Renews the attestation signer in the background while the daemon runs.
pub(crate) struct Keeper {
    service: Arc<Service>,
    /// The key of an unfinished signer. The next attempt uses it, since keys on an HSM are never removed.
    unfinished: Option<(KeyRef, RsaPublicKey)>,
    absence: Absence,
}

impl Keeper {
    /// Creates the keeper of the service's signer.
    #[must_use]
    pub(crate) fn new(service: Arc<Service>) -> Self {
        Self { service, unfinished: None, absence: Absence::default() }
    }

    /// Checks the signer periodically, and whenever a signature found its key missing.
    pub(crate) async fn run(mut self) {
        let mut asked = false;
        let mut failing = false;
        loop {
            let result = self.look(asked).await;
            if let Err(error) = &result {
                if !failing {
                    tracing::error!(%error, "the check of the attestation signer failed; trying again (this is logged once)");
                }
                tokio::time::sleep(RETRY).await;
            }
            failing = result.is_err();
            let pause = match (self.service.registry.signers().current().is_some(), failing) {
                (true, _) => LOOK_EVERY,
                // After a failure, the pause was made above.
                (false, true) => Duration::ZERO,
                // The state has a signer that is not loaded yet. Do not generate another key meanwhile, because keys on
                // an HSM are never removed.
                (false, false) => RETRY,
            };
            // A timeout means that no signature found the key missing.
            asked = tokio::time::timeout(pause, self.service.signer_missing.notified()).await.is_ok();
        }
    }

    /// Creates a new signer if there is none, if the current one is due for renewal, or if members that are up lack its
    /// key. Deletes previous signers whose last health certificate has expired. With `asked`, the tokens are searched;
    /// otherwise the cached key lists are used.
    ///
    /// # Errors
    /// See [`SignerError`]; the current signer stays as it was.
    pub(crate) async fn look(&mut self, asked: bool) -> Result<(), SignerError> {
        let signers = Arc::clone(&self.service.registry.signers());
        let Some(current) = signers.current() else { return self.renew().await };
        // The unfinished signer has been installed after all.
        self.unfinished.take_if(|(id, _)| *id == current.id);
        if current.certificate.not_after() - unix_now() <= RENEWAL {
            return self.renew().await;
        }
        let (held, lacking) = whereabouts(&self.service.cluster, &current.id, asked).await;
        if self.absence.calls_for_another(held, &lacking, standstill::now()) {
            tracing::warn!(?lacking, "members lack the attestation signer's key; a new signer replaces it");
            self.renew().await?;
            self.absence.made_another(standstill::now());
            return Ok(());
        }
        // A previous signer is trusted until the last health certificate that it can have issued has expired.
        let oldest = unix_now() - LIFETIME_SECONDS;
        if signers.first_replaced().is_some_and(|replaced| replaced < oldest) {
            self.service.registry.change(move |state| state.forget_signers_before(oldest)).await?;
        }
        Ok(())
    }

    /// Makes a signer in place of the one that was current when this was decided. Does nothing if another node makes one
    /// at this time, or has made one since: the next check sees it.
    async fn renew(&mut self) -> Result<(), SignerError> {
        let seen = current(&self.service);
        let Some(turn) = Makers::turn(&self.service).await? else { return Ok(()) };
        let made = if current(&self.service) == seen { self.make(seen).await } else { Ok(()) };
        turn.end().await;
        made
    }

    async fn make(&mut self, replaces: Option<String>) -> Result<(), SignerError> {
        let (id, public) = match self.unfinished.take() {
            Some(key) => key,
            None => new_key(&self.service.cluster).await?,
        };
        let result = install(&self.service, &id, &public, replaces).await;
        if result.as_ref().is_err_and(SignerError::leaves_the_key_good) {
            self.unfinished = Some((id, public));
        }
        result
    }
}

impl SignerError {
    /// Whether the next attempt may use the same key.
    fn leaves_the_key_good(&self) -> bool {
        match self {
            // No member has the key.
            Self::Hsm(Failure { error: HsmError::NoSuchKey, .. }) => false,
            Self::State(ChangeError::State(StateError::Revoked(_))) => false,
            Self::Hsm(_) | Self::Key(_) | Self::Build(_) | Self::State(_) | Self::Board(_) | Self::OthersTurn => true,
        }
    }
}

/// The thumbprint of the current signer, hexadecimal.
#[must_use]
pub(crate) fn current(service: &Service) -> Option<String> {
    service.registry.signers().current_thumbprint().map(str::to_owned)
}

/// Creates a new signer with a new key, regardless of the current one.
///
/// # Errors
/// See [`SignerError`]; the current signer stays as it was.
pub(crate) async fn replace(service: &Arc<Service>) -> Result<(), SignerError> {
    let turn = Makers::turn(service).await?.ok_or(SignerError::OthersTurn)?;
    let replaces = current(service);
    let made = async {
        let (id, public) = new_key(&service.cluster).await?;
        install(service, &id, &public, replaces).await
    };
    let made = made.await;
    turn.end().await;
    made
}

/// The nodes that may make a signer. A key that was made in vain stays on the HSMs, so one node makes one at a time.
enum Makers {
    /// The state is local: this daemon is the only node.
    Alone,
    /// It is this node's turn.
    Turn(Turn),
}

impl Makers {
    /// Takes the turn, and loads what the node that had it before may have made. `None`: another node has it.
    async fn turn(service: &Arc<Service>) -> Result<Option<Self>, SignerError> {
        let Some(board) = &service.board else { return Ok(Some(Self::Alone)) };
        let node = service.config.load().server.node();
        let Some(turn) = Turn::take(board, "attestation-signer", &node, TURN).await? else { return Ok(None) };
        // An empty change reads the newest state.
        match service.registry.change(|state| state.change(|_| Ok(()))).await {
            Ok(()) => Ok(Some(Self::Turn(turn))),
            Err(error) => {
                turn.end().await;
                Err(error.into())
            }
        }
    }

    async fn end(self) {
        match self {
            Self::Alone => {}
            Self::Turn(turn) => turn.end().await,
        }
    }
}

/// Has a key sign its own certificate, and makes it the current signer in place of `replaces`.
async fn install(
    service: &Arc<Service>,
    id: &KeyRef,
    public: &RsaPublicKey,
    replaces: Option<String>,
) -> Result<(), SignerError> {
    let now = unix_now();
    let (not_before, not_after) = (now - health::BACKDATED_SECONDS, now + VALIDITY);
    let to_be_signed = health::signer_template(public, not_before, not_after)?.to_be_signed()?;
    let signed =
        signing::sign(&service.cluster, id, public, to_be_signed.octets(), standstill::now() + OWN_DEADLINE).await;
    let signed = signed.map_err(Failure::from)?;
    let (der, id) = (to_be_signed.assemble(&signed.value), id.clone());
    let added = service
        .registry
        .change(move |state| {
            state.add_signer(
                &NewSigner { der: &der, key_id: &id.id.0, not_before, not_after },
                replaces.as_deref(),
                now,
            )
        })
        .await;
    match added {
        Ok(_) => tracing::info!("a new attestation signer issues health certificates"),
        // Daemons that share a state share a signer. The failed change has loaded the signer of the other daemon.
        Err(ChangeError::State(StateError::Conflict(_))) => {
            tracing::info!("another daemon has made a new attestation signer; this daemon uses it too");
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Tracks which members that are up lack the current signer's key, and decides when a new signer is needed.
#[derive(Debug, Default)]
struct Absence {
    /// Number of consecutive checks at which each member lacked the key.
    looks: HashMap<String, u32>,
    /// Time of the last new signer for such a member, and the pause before the next one.
    last: Option<(Instant, Duration)>,
}

impl Absence {
    /// Whether to create a new signer, after a check in which `held` members had the key and `lacking` did not.
    fn calls_for_another(&mut self, held: usize, lacking: &[String], now: Instant) -> bool {
        if lacking.is_empty() {
            *self = Self::default();
            return false;
        }
        self.looks.retain(|member, _| lacking.contains(member));
        for member in lacking {
            *self.looks.entry(member.clone()).or_default() += 1;
        }
        // If no member has the key, nothing can be signed. Do not wait for replication or for the longer pauses.
        let nobody = held == 0;
        let rested = self
            .last
            .is_none_or(|(at, pause)| now.saturating_duration_since(at) >= if nobody { FIRST_PAUSE } else { pause });
        rested && (nobody || self.looks.values().any(|looks| *looks >= LOOKS))
    }

    fn made_another(&mut self, now: Instant) {
        let pause = self.last.map_or(FIRST_PAUSE, |(_, last)| (last * 2).min(LONGEST_PAUSE));
        *self = Self { looks: HashMap::new(), last: Some((now, pause)) };
    }
}

/// Returns how many members that are up have a key, and which ones lack it. Members that do not answer are in neither
/// group.
async fn whereabouts(cluster: &Cluster, id: &KeyRef, search: bool) -> (usize, Vec<String>) {
    let (mut held, mut lacking) = (0, Vec::new());
    for member in cluster.members().into_iter().filter(|member| member.state == MemberState::Up) {
        match standstill::timeout(PATIENCE, has(cluster, &member.name, id, search)).await {
            Ok(Ok(true)) => held += 1,
            Ok(Ok(false)) => lacking.push(member.name),
            Ok(Err(_)) | Err(_) => {}
        }
    }
    (held, lacking)
}

/// Whether a member has a key. A key that is not in the cached list is searched for on the token, because it may have
/// been replicated.
async fn has(cluster: &Cluster, member: &str, id: &KeyRef, search: bool) -> Result<bool, Failure> {
    if !search && cluster.keys_on(member, false).await?.iter().any(|key| key.is(id)) {
        return Ok(true);
    }
    Ok(cluster.keys_on(member, true).await?.iter().any(|key| key.is(id)))
}

/// Generates a new signing key for every member that can accept one now. A single member generates the key itself. With
/// several members, it is unknown whether the vendor replicates keys, so the key is generated here, imported into each
/// member, and wiped.
async fn new_key(cluster: &Cluster) -> Result<(KeyRef, RsaPublicKey), SignerError> {
    let all = cluster.members();
    let single = all.len() == 1;
    let works = |state| matches!(state, MemberState::Up | MemberState::Draining | MemberState::Drained);
    let members: Vec<String> = all.into_iter().filter(|m| works(m.state)).map(|m| m.name).collect();
    let Some(first) = members.first() else {
        return Err(Failure::from(HsmError::NoneServing).into());
    };
    let mut id = [0; 20];
    use ring::rand::SecureRandom;
    ring::rand::SystemRandom::new().fill(&mut id).map_err(|_| SignerError::Build(BuildError::Random))?;
    let id = KeyId(id.to_vec());
    let spec =
        NewKey { id: id.clone(), label: "claviger attestation signer".to_owned(), bits: BITS, usage: KeyUsage::Sign };
    if single {
        let public = cluster.generate_rsa(first, spec).await?;
        let public = RsaPublicKey::from_components(&public.n, &public.e)?;
        return Ok((KeyRef::new(id, public.modulus()), public));
    }
    let key = tokio::task::spawn_blocking(|| RsaPrivateKey::generate(BITS))
        .await
        .map_err(|_| SignerError::Build(BuildError::Random))??;
    let mut failed = None;
    let mut imported = 0;
    for member in &members {
        match cluster.import_rsa(member, spec.clone(), private_parts(&key)).await {
            Ok(()) => imported += 1,
            // The cluster signs with the members that have the key.
            Err(error) => {
                tracing::warn!(hsm = member, %error, "the new attestation signer's key is missing on a member");
                failed = Some(error);
            }
        }
    }
    match failed {
        Some(error) if imported == 0 => Err(error.into()),
        _ => Ok((KeyRef::new(id, key.public().modulus()), key.public().clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revoked_key_is_nothing_to_go_on_with() {
        let error = |state| SignerError::State(ChangeError::State(state));
        assert!(!error(StateError::Revoked("x".to_owned())).leaves_the_key_good());
        assert!(error(StateError::Invalid("x".to_owned())).leaves_the_key_good());
    }

    #[test]
    fn a_key_that_a_member_lacks_for_long_is_replaced_but_not_for_ever() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let lacking = ["b".to_owned()];
        let mut absence = Absence::default();
        // A single check may be a delay of replication. If the key appears in between, counting starts again.
        assert!(!absence.calls_for_another(1, &lacking, at(0)));
        assert!(!absence.calls_for_another(2, &[], at(30)));
        assert!(!absence.calls_for_another(1, &lacking, at(60)));
        assert!(!absence.calls_for_another(1, &["c".to_owned()], at(90)));
        assert!(!absence.calls_for_another(1, &lacking, at(120)));
        // Until the new signer is created.
        assert!(absence.calls_for_another(1, &lacking, at(150)));
        assert!(absence.calls_for_another(1, &lacking, at(180)));
        absence.made_another(at(180));
        // A member that never accepts a key does not cause endless attempts.
        let mut made = 0;
        for look in 1..=3 * 24 * 120 {
            if absence.calls_for_another(1, &lacking, at(180 + look * 30)) {
                absence.made_another(at(180 + look * 30));
                made += 1;
            }
        }
        assert!((8..=13).contains(&made), "{made} signers in three days");
        // If no member has the key, the next signer follows soon, regardless of earlier pauses.
        assert!(absence.calls_for_another(0, &lacking, at(300_000)));
        absence.made_another(at(300_000));
        assert!(!absence.calls_for_another(0, &lacking, at(300_030)));
        assert!(absence.calls_for_another(0, &lacking, at(300_060)));
    }
}
