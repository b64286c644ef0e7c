//! The keys on the members' tokens: whether each member has one, and where a certificate's key is.

use std::sync::Arc;
use std::time::Duration;

use claviger_hsm::{Fingerprint, KeyId, KeyRef, MemberState, TokenKey, standstill};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::rsa_key::RsaPublicKey;
use data_encoding::HEXLOWER_PERMISSIVE;

use super::import::imported_id;
use crate::registry::keys::Key;
use crate::service::Service;
use crate::store::Kind;

/// Time limit for asking a member whether it has a key.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Checks that every member has the right key and can use it for this kind of certificate.
///
/// # Errors
/// What is wrong, or which members could not be checked.
pub(in crate::admin::handlers) async fn on_all_members(
    service: &Arc<Service>,
    kind: Kind,
    id: &[u8],
    certificate: &Certificate,
    trust_absent: bool,
) -> Result<Vec<String>, String> {
    let key = Key::new(certificate.clone(), id);
    let id = &key.id.id;
    let lacking = lacking(service, &key.id).await;
    let (absent, wrong): (Vec<_>, Vec<_>) = lacking.into_iter().partition(|lack| lack.absent);
    if !wrong.is_empty() {
        return Err(format!(
            "the certificate's key {id} is not on every member: {}. Keys are replicated with the vendor's tools, or brought \
             in with claviger keys add --pfx",
            sentence(&wrong)
        ));
    }
    if !absent.is_empty() && !trust_absent {
        return Err(format!(
            "whether the key {id} is on every member cannot be found out: {}. Try again when they answer; --trust-absent \
             takes them to have it",
            sentence(&absent)
        ));
    }
    prove(service, kind, &key).await?;
    Ok(absent.iter().map(|lack| format!("not checked: {} {}", lack.member, lack.what)).collect())
}

/// Has each member that is up use the key for its purpose: a member may have the key without the right to use it.
async fn prove(service: &Arc<Service>, kind: Kind, key: &Key) -> Result<(), String> {
    let does = match kind {
        Kind::Signing => "sign",
        Kind::Encryption => "decrypt",
    };
    let id = &key.id.id;
    let known = key.known_answer(kind).ok_or_else(|| format!("nothing can be tried with the key {id}"))?;
    let mut members = service.cluster.members();
    members.retain(|member| member.state == MemberState::Up);
    if members.is_empty() {
        return Err(format!("no HSM is up to try the key {id} on"));
    }
    for member in members {
        let proved = service.cluster.self_test(&member.name, &known).await;
        proved.map_err(|error| format!("the key {id} does not {does} on {}: {error}", member.name))?;
    }
    Ok(())
}

/// A member without a key.
pub(super) struct Lack {
    pub(super) member: String,
    what: String,
    /// Whether the member could not be asked.
    absent: bool,
}

pub(super) fn sentence(lacking: &[Lack]) -> String {
    lacking.iter().map(|lack| format!("{} {}", lack.member, lack.what)).collect::<Vec<_>>().join(", ")
}

/// The members without this key. Each token is searched, because another program may have just created the key.
pub(super) async fn lacking(service: &Arc<Service>, key: &KeyRef) -> Vec<Lack> {
    let mut lacking = Vec::new();
    for hsm in &service.config.load_full().hsm {
        let lack = |what: String, absent| Some(Lack { member: hsm.name.clone(), what, absent });
        let lack = match standstill::timeout(PATIENCE, service.cluster.keys_on(&hsm.name, true)).await {
            Ok(Ok(keys)) => what_is_missing(&keys, key).and_then(|what| lack(what, false)),
            Ok(Err(error)) => lack(format!("does not answer: {error}"), true),
            Err(_) => lack("does not answer in time".to_owned(), true),
        };
        lacking.extend(lack);
    }
    lacking
}

/// What prevents a token with these keys from using the wanted one; `None`: nothing.
fn what_is_missing(keys: &[TokenKey], wanted: &KeyRef) -> Option<String> {
    let of_id = || keys.iter().filter(|key| key.has_id(&wanted.id));
    // If the token does not show the modulus of a key, only using the key can prove that it is the right one.
    if of_id().any(|key| key.is(wanted) || key.fingerprint.is_none()) {
        return None;
    }
    let same = keys.iter().find(|key| key.fingerprint == Some(wanted.public));
    Some(match same {
        Some(TokenKey { id: Some(id), .. }) => format!("has the key, but with the CKA_ID {id}"),
        Some(TokenKey { label, .. }) => {
            format!("has the key (label {label:?}), but without a CKA_ID, by which keys are used")
        }
        None if of_id().next().is_some() => "has another key of that id".to_owned(),
        None => "shows no such key".to_owned(),
    })
}

/// Searches the members for the key of a certificate, and returns its id.
pub(super) async fn find(service: &Arc<Service>, kind: Kind, public: &RsaPublicKey) -> Result<KeyId, String> {
    let mut nameless = None;
    for hsm in &service.config.load_full().hsm {
        let keys = standstill::timeout(PATIENCE, service.cluster.keys_on(&hsm.name, true)).await;
        let Ok(Ok(keys)) = keys else { continue };
        match choose(&keys, kind, public) {
            Found::One(id) => return Ok(id),
            Found::Several(ids) => {
                return Err(format!(
                    "the certificate's key is there several times; choose one with --hsm-key: {}",
                    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
                ));
            }
            Found::Nameless(label) => nameless = Some((hsm.name.clone(), label)),
            Found::Nothing => {}
        }
    }
    Err(match nameless {
        Some((member, label)) => format!(
            "{member} has the certificate's key (label {label:?}), but without a CKA_ID, by which keys are used: give it one \
             with the vendor's tool or with pkcs11-tool --set-id"
        ),
        None => "no HSM that answers has the certificate's key; import it with --pfx, or tell its id with --hsm-key"
            .to_owned(),
    })
}

/// The location of a certificate's key on a token.
#[derive(Debug, PartialEq)]
enum Found {
    One(KeyId),
    Several(Vec<KeyId>),
    /// The key has no `CKA_ID`, but this label.
    Nameless(String),
    Nothing,
}

/// Selects the id of a certificate's key among the keys of a token. A key may be there with several ids, for example
/// if it was imported for both kinds: the one with the right permissions is selected.
fn choose(keys: &[TokenKey], kind: Kind, public: &RsaPublicKey) -> Found {
    let wanted = Fingerprint::of_modulus(public.modulus());
    let same: Vec<_> = keys.iter().filter(|key| key.fingerprint == Some(wanted)).collect();
    let ids = |able: &dyn Fn(&TokenKey) -> bool| {
        let mut ids: Vec<_> = same.iter().filter(|key| able(key)).filter_map(|key| key.id.clone()).collect();
        ids.dedup();
        ids
    };
    let all = ids(&|_| true);
    let imported = imported_id(kind, public);
    if all.contains(&imported) {
        return Found::One(imported);
    }
    let able = ids(&|key| match kind {
        Kind::Signing => key.signs,
        Kind::Encryption => key.decrypts,
    });
    match (able.as_slice(), all.as_slice(), same.as_slice()) {
        ([id], ..) | ([], [id], _) => Found::One(id.clone()),
        ([], [], [key, ..]) => Found::Nameless(key.label.clone()),
        ([], [], []) => Found::Nothing,
        _ => Found::Several(all),
    }
}

/// Finds the public key of the key with this id on the members that answer.
pub(super) async fn public_of(service: &Arc<Service>, id: &KeyId) -> Result<RsaPublicKey, String> {
    for hsm in &service.config.load_full().hsm {
        let keys = standstill::timeout(PATIENCE, service.cluster.keys_on(&hsm.name, true)).await;
        let Ok(Ok(keys)) = keys else { continue };
        if let Some(public) = only_of_id(&keys, id)? {
            return Ok(public);
        }
    }
    Err(format!("no HSM that answers has a key {id}"))
}

/// The public key of the only key with this id. If there are several, the id alone does not identify the key.
fn only_of_id(keys: &[TokenKey], id: &KeyId) -> Result<Option<RsaPublicKey>, String> {
    let of_id: Vec<_> = keys.iter().filter(|key| key.has_id(id)).collect();
    let Some(first) = of_id.first() else { return Ok(None) };
    if of_id.iter().any(|key| key.fingerprint != first.fingerprint) {
        let labels: Vec<_> = of_id.iter().map(|key| format!("{:?}", key.label)).collect();
        return Err(format!(
            "several keys have the CKA_ID {id} (labels {}), so that it does not say which is meant; give the key an id of its \
             own with the vendor's tool",
            labels.join(", ")
        ));
    }
    let public = of_id.iter().find_map(|key| key.public.as_ref());
    let public = public.ok_or_else(|| format!("the token does not tell the public key of {id}"))?;
    RsaPublicKey::from_components(&public.n, &public.e).map(Some).map_err(|e| format!("the key {id}: {e}"))
}

/// The digits of a thumbprint as programs of others show it: upper case, with colons or spaces.
pub(in crate::admin::handlers) fn digits(thumbprint: &str) -> String {
    thumbprint.chars().filter(|c| !matches!(c, ':' | ' ')).map(|c| c.to_ascii_lowercase()).collect()
}

pub(super) fn key_id(hexadecimal: &str) -> Result<KeyId, String> {
    match HEXLOWER_PERMISSIVE.decode(digits(hexadecimal).as_bytes()) {
        Ok(id) if (1..=255).contains(&id.len()) => Ok(KeyId(id)),
        _ => Err("the id of a key in the HSMs is hexadecimal, two digits for each byte".to_owned()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::registry::keys::key_ref;
    use crate::service::testing;
    use claviger_hsm::RsaPublic;
    use claviger_protocol::rsa_key::RsaPrivateKey;

    fn token_key(id: &[u8], label: &str, public: Option<&RsaPublicKey>, signs: bool) -> TokenKey {
        TokenKey {
            id: (!id.is_empty()).then(|| KeyId(id.to_vec())),
            label: label.to_owned(),
            public: public.map(|key| RsaPublic { n: key.modulus().to_vec(), e: key.exponent().to_vec() }),
            decrypts: !signs,
            signs,
            always_authenticate: false,
            fingerprint: public.map(|key| Fingerprint::of_modulus(key.modulus())),
        }
    }

    #[test]
    fn a_certificates_key_is_found_by_its_public_key() {
        let (ours, other) = (testing::key().public(), RsaPrivateKey::generate(2048).unwrap());
        let found = |keys: &[TokenKey], kind| choose(keys, kind, ours);
        let one = |id: &[u8]| Found::One(KeyId(id.to_vec()));
        let stranger = token_key(b"a", "x", Some(other.public()), true);
        assert_eq!(found(std::slice::from_ref(&stranger), Kind::Signing), Found::Nothing);
        let same_id = token_key(b"a", "y", Some(ours), true);
        assert_eq!(found(&[stranger, same_id.clone()], Kind::Signing), one(b"a"));
        // The key exists twice: the one with the required permission is selected.
        let decrypts = token_key(b"b", "z", Some(ours), false);
        assert_eq!(found(&[same_id.clone(), decrypts.clone()], Kind::Signing), one(b"a"));
        assert_eq!(found(&[same_id.clone(), decrypts], Kind::Encryption), one(b"b"));
        let again = token_key(b"c", "z", Some(ours), true);
        let several = Found::Several(vec![KeyId(b"a".to_vec()), KeyId(b"c".to_vec())]);
        assert_eq!(found(&[same_id.clone(), again.clone()], Kind::Signing), several);
        let imported = TokenKey { id: Some(imported_id(Kind::Signing, ours)), ..again };
        assert_eq!(found(&[same_id, imported.clone()], Kind::Signing), Found::One(imported.id.unwrap()));
        let nameless = token_key(b"", "forgotten", Some(ours), true);
        assert_eq!(found(&[nameless], Kind::Signing), Found::Nameless("forgotten".to_owned()));
    }

    #[test]
    fn what_a_member_lacks_is_said() {
        let (ours, other) = (testing::key().public(), RsaPrivateKey::generate(2048).unwrap());
        let wanted = key_ref(b"a", ours);
        let missing = |keys: &[TokenKey]| what_is_missing(keys, &wanted).unwrap_or_default();
        let stranger = token_key(b"a", "x", Some(other.public()), true);
        assert_eq!(missing(&[stranger.clone(), token_key(b"a", "x", Some(ours), true)]), "");
        assert_eq!(missing(&[stranger.clone(), token_key(b"a", "x", None, true)]), "", "it proves itself");
        assert_eq!(missing(&[]), "shows no such key");
        assert_eq!(missing(std::slice::from_ref(&stranger)), "has another key of that id");
        assert_eq!(
            missing(&[stranger.clone(), token_key(b"b", "x", Some(ours), true)]),
            "has the key, but with the CKA_ID 62"
        );
        assert!(missing(&[stranger, token_key(b"", "x", Some(ours), true)]).contains("without a CKA_ID"));
    }

    #[test]
    fn an_id_that_means_two_keys_names_none() {
        let (ours, other) = (testing::key().public(), RsaPrivateKey::generate(2048).unwrap());
        let id = KeyId(b"a".to_vec());
        let [one, two] = [ours, other.public()].map(|key| token_key(b"a", "x", Some(key), true));
        assert_eq!(only_of_id(&[], &id), Ok(None));
        assert_eq!(only_of_id(&[one.clone(), one.clone()], &id), Ok(Some(ours.clone())));
        assert!(only_of_id(&[one, two], &id).unwrap_err().contains("several keys have the CKA_ID 61"));
        assert!(only_of_id(&[token_key(b"a", "x", None, true)], &id).is_err());
    }

    #[test]
    fn keys_are_named_by_what_they_are() {
        let public = testing::key().public();
        assert_ne!(imported_id(Kind::Signing, public), imported_id(Kind::Encryption, public));
        assert_eq!(key_id("0A0b").unwrap(), KeyId(vec![10, 11]));
        for wrong in ["", "0", "xy", &"00".repeat(256)] {
            assert!(key_id(wrong).is_err(), "{wrong}");
        }
    }
}
