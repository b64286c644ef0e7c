//! Key objects of a token: search, attributes, and templates for new objects.

use cryptoki::error::{Error, RvError};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use zeroize::Zeroize;

use crate::code::Function;
use crate::error::HsmError;
use crate::identity::{Fingerprint, KeyId, without_leading_zeros};
use crate::keys::{NewKey, RsaPublic};
use crate::worker::key_table::{self, FoundKey, FoundPublic, KeyTable};

/// Buffer size for a signature if a token does not reveal the modulus: enough for 16384 bits.
const LARGEST_MODULUS: usize = 2048;

/// A private key with a handle of this session.
pub(crate) type Key = key_table::Key<ObjectHandle>;

impl Key {
    /// Returns the buffer size for a signature.
    pub(crate) fn room(&self) -> usize {
        self.modulus_len.unwrap_or(LARGEST_MODULUS)
    }
}

/// Finds all RSA private keys of a token in one search. Also searches the public keys, if a private key does not reveal its
/// public key.
pub(crate) fn private_keys(session: &Session) -> Result<KeyTable<ObjectHandle>, HsmError> {
    let handles =
        session.find_objects(&[Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::KeyType(KeyType::RSA)])?;
    let mut found = Vec::with_capacity(handles.len());
    for handle in handles {
        let wanted = [
            AttributeType::Id,
            AttributeType::Label,
            AttributeType::Modulus,
            AttributeType::PublicExponent,
            AttributeType::Decrypt,
            AttributeType::Sign,
            AttributeType::AlwaysAuthenticate,
        ];
        let Some(attributes) = attributes_of(session, handle, &wanted)? else { continue };
        let mut key = FoundKey {
            handle,
            id: Vec::new(),
            label: String::new(),
            n: Vec::new(),
            e: Vec::new(),
            decrypts: true,
            signs: true,
            always_authenticate: false,
        };
        for attribute in attributes {
            match attribute {
                Attribute::Id(id) => key.id = id,
                Attribute::Label(label) => key.label = String::from_utf8_lossy(&label).into_owned(),
                Attribute::Modulus(n) => key.n = n,
                Attribute::PublicExponent(e) => key.e = e,
                Attribute::Decrypt(decrypts) => key.decrypts = decrypts,
                Attribute::Sign(signs) => key.signs = signs,
                Attribute::AlwaysAuthenticate(always) => key.always_authenticate = always,
                _ => {}
            }
        }
        found.push(key);
    }
    let publics =
        if found.iter().any(|key| key.n.is_empty() || key.e.is_empty()) { public_keys(session)? } else { Vec::new() };
    Ok(KeyTable::new(found, &publics))
}

fn public_keys(session: &Session) -> Result<Vec<FoundPublic>, HsmError> {
    let handles =
        session.find_objects(&[Attribute::Class(ObjectClass::PUBLIC_KEY), Attribute::KeyType(KeyType::RSA)])?;
    let mut found = Vec::with_capacity(handles.len());
    for handle in handles {
        let Some(attributes) = attributes_of(session, handle, &[AttributeType::Id, AttributeType::Label])? else {
            continue;
        };
        let Some(key) = read_public(session, handle)? else { continue };
        let mut public = FoundPublic { id: Vec::new(), label: String::new(), key };
        for attribute in attributes {
            match attribute {
                Attribute::Id(id) => public.id = id,
                Attribute::Label(label) => public.label = String::from_utf8_lossy(&label).into_owned(),
                _ => {}
            }
        }
        found.push(public);
    }
    Ok(found)
}

/// Returns the public key objects with this id and modulus.
pub(crate) fn public_objects(session: &Session, id: &[u8], public: Fingerprint) -> Result<Vec<ObjectHandle>, HsmError> {
    let wanted =
        [Attribute::Class(ObjectClass::PUBLIC_KEY), Attribute::KeyType(KeyType::RSA), Attribute::Id(id.to_vec())];
    let mut found = Vec::new();
    for handle in session.find_objects(&wanted)? {
        if read_public(session, handle)?.is_some_and(|key| Fingerprint::of_modulus(&key.n) == public) {
            found.push(handle);
        }
    }
    Ok(found)
}

/// Returns the attributes; `None` for an object that was destroyed since the search.
fn attributes_of(
    session: &Session,
    object: ObjectHandle,
    wanted: &[AttributeType],
) -> Result<Option<Vec<Attribute>>, HsmError> {
    match session.get_attributes(object, wanted) {
        Err(Error::Pkcs11(RvError::ObjectHandleInvalid, _)) => Ok(None),
        attributes => Ok(Some(attributes?)),
    }
}

/// Returns the public key; `None` if the token does not reveal it or the object is gone.
pub(crate) fn read_public(session: &Session, object: ObjectHandle) -> Result<Option<RsaPublic>, HsmError> {
    let wanted = [AttributeType::Modulus, AttributeType::PublicExponent];
    let (mut n, mut e) = (Vec::new(), Vec::new());
    for attribute in attributes_of(session, object, &wanted)?.into_iter().flatten() {
        match attribute {
            Attribute::Modulus(bytes) => n = without_leading_zeros(&bytes).to_vec(),
            Attribute::PublicExponent(bytes) => e = without_leading_zeros(&bytes).to_vec(),
            _ => {}
        }
    }
    Ok((!n.is_empty() && !e.is_empty()).then_some(RsaPublic { n, e }))
}

pub(crate) fn expect_id(id: &KeyId) -> Result<(), HsmError> {
    if id.0.is_empty() {
        return Err(HsmError::new(Function::CreateObject, RvError::AttributeValueInvalid));
    }
    Ok(())
}

pub(crate) fn public_template(spec: &NewKey) -> Vec<Attribute> {
    vec![
        Attribute::Token(true),
        Attribute::Private(false),
        Attribute::Id(spec.id.0.clone()),
        Attribute::Label(spec.label.clone().into_bytes()),
        Attribute::Verify(spec.usage.signs()),
        Attribute::Encrypt(spec.usage.decrypts()),
    ]
}

pub(crate) fn private_template(spec: &NewKey) -> Vec<Attribute> {
    vec![
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Id(spec.id.0.clone()),
        Attribute::Label(spec.label.clone().into_bytes()),
        Attribute::Sign(spec.usage.signs()),
        Attribute::Decrypt(spec.usage.decrypts()),
    ]
}

/// Attributes of a template that hold a private key; zeroised on drop.
pub(crate) struct SecretTemplate(pub(crate) Vec<Attribute>);

impl Drop for SecretTemplate {
    fn drop(&mut self) {
        for attribute in &mut self.0 {
            if let Attribute::PrivateExponent(bytes)
            | Attribute::Prime1(bytes)
            | Attribute::Prime2(bytes)
            | Attribute::Exponent1(bytes)
            | Attribute::Exponent2(bytes)
            | Attribute::Coefficient(bytes) = attribute
            {
                bytes.zeroize();
            }
        }
    }
}
