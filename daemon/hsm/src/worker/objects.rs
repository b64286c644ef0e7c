//! Key objects of a token: search, attributes, and templates for new objects.

use cryptoki::error::{Error, RvError};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use zeroize::Zeroize;

use crate::code::Function;
use crate::error::HsmError;
use crate::fault::{FaultOwner, SessionAction};
use crate::identity::{Fingerprint, KeyId, without_leading_zeros};
use crate::keys::{NewKey, RsaPrivateParts, RsaPublic};
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
    let (found, unreadable) = read_each(handles, |handle| private_key(session, handle))?;
    let publics =
        if found.iter().any(|key| key.n.is_empty() || key.e.is_empty()) { public_keys(session)? } else { Vec::new() };
    Ok(KeyTable::new(found, &publics, &unreadable))
}

fn private_key(session: &Session, handle: ObjectHandle) -> Result<Option<FoundKey<ObjectHandle>>, HsmError> {
    let wanted = [
        AttributeType::Id,
        AttributeType::Label,
        AttributeType::Modulus,
        AttributeType::PublicExponent,
        AttributeType::Decrypt,
        AttributeType::Sign,
        AttributeType::AlwaysAuthenticate,
    ];
    let Some(attributes) = attributes_of(session, handle, &wanted)? else { return Ok(None) };
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
    Ok(Some(key))
}

fn public_keys(session: &Session) -> Result<Vec<FoundPublic>, HsmError> {
    let handles =
        session.find_objects(&[Attribute::Class(ObjectClass::PUBLIC_KEY), Attribute::KeyType(KeyType::RSA)])?;
    let (found, _) = read_each(handles, |handle| {
        let wanted = [AttributeType::Id, AttributeType::Label];
        let Some(attributes) = attributes_of(session, handle, &wanted)? else { return Ok(None) };
        let Some(key) = read_public(session, handle)? else { return Ok(None) };
        let mut public = FoundPublic { id: Vec::new(), label: String::new(), key };
        for attribute in attributes {
            match attribute {
                Attribute::Id(id) => public.id = id,
                Attribute::Label(label) => public.label = String::from_utf8_lossy(&label).into_owned(),
                _ => {}
            }
        }
        Ok(Some(public))
    })?;
    Ok(found)
}

/// Reads objects; returns those that `read` returns, and the errors of those that cannot be read. One odd object, perhaps of
/// another application, must not make the token unusable.
///
/// # Errors
/// Returns an error that is not about one object, that of a busy token, or the first error if no object can be read.
fn read_each<H: Copy, T>(
    objects: Vec<H>,
    read: impl Fn(H) -> Result<Option<T>, HsmError>,
) -> Result<(Vec<T>, Vec<HsmError>), HsmError> {
    let (mut found, mut unreadable) = (Vec::with_capacity(objects.len()), Vec::new());
    for object in objects {
        let read_once = read(object);
        // A token that is busy for a moment must not seem to lack a key.
        let read = if read_once.as_ref().is_err_and(is_about_one_object) { read(object) } else { read_once };
        match read {
            Ok(object) => found.extend(object),
            Err(error) if is_busy(&error) => return Err(error),
            Err(error) if is_about_one_object(&error) => unreadable.push(error),
            Err(error) => return Err(error),
        }
    }
    match unreadable.first() {
        Some(error) if found.is_empty() => Err(*error),
        _ => Ok((found, unreadable)),
    }
}

/// Returns true if the token may answer the same call a moment later.
fn is_busy(error: &HsmError) -> bool {
    let fault = error.fault();
    fault.owner == FaultOwner::Member && fault.session == SessionAction::Keep
}

/// Returns false if the error says that the session, the token or the module is lost.
fn is_about_one_object(error: &HsmError) -> bool {
    let lost = [RvError::DeviceRemoved, RvError::TokenNotPresent, RvError::CryptokiNotInitialized];
    error.fault().session != SessionAction::Renew && !lost.into_iter().any(|code| error.is_code(code))
}

/// Returns the public key objects with this id and modulus.
pub(crate) fn public_objects(session: &Session, id: &[u8], public: Fingerprint) -> Result<Vec<ObjectHandle>, HsmError> {
    let wanted =
        [Attribute::Class(ObjectClass::PUBLIC_KEY), Attribute::KeyType(KeyType::RSA), Attribute::Id(id.to_vec())];
    let (found, _) = read_each(session.find_objects(&wanted)?, |handle| {
        let key = read_public(session, handle)?;
        Ok(key.filter(|key| Fingerprint::of_modulus(&key.n) == public).map(|_| handle))
    })?;
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

/// The numbers of a private key as attributes of its object.
pub(crate) fn private_numbers(parts: &RsaPrivateParts) -> [Attribute; 8] {
    [
        Attribute::Modulus(parts.n.clone()),
        Attribute::PublicExponent(parts.e.clone()),
        Attribute::PrivateExponent(parts.d.clone()),
        Attribute::Prime1(parts.p.clone()),
        Attribute::Prime2(parts.q.clone()),
        Attribute::Exponent1(parts.dp.clone()),
        Attribute::Exponent2(parts.dq.clone()),
        Attribute::Coefficient(parts.qinv.clone()),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: RvError) -> HsmError {
        HsmError::new(Function::GetAttributeValue, code)
    }

    #[test]
    fn an_odd_object_is_left_out() {
        for odd in [error(RvError::GeneralError), error(RvError::DeviceError), HsmError::Nonsense] {
            let read = |object| if object == 2 { Err(odd) } else { Ok(Some(object).filter(|object| *object != 3)) };
            assert_eq!(read_each(vec![1, 2, 3, 4], read), Ok((vec![1, 4], vec![odd])));
            assert_eq!(read_each(vec![2, 3], read), Err(odd), "nothing can be read");
        }
        assert_eq!(read_each(Vec::new(), |object: u8| Ok(Some(object))), Ok((vec![], vec![])));
    }

    #[test]
    fn what_ends_the_session_is_not_about_one_object() {
        for lost in [RvError::SessionHandleInvalid, RvError::DeviceRemoved, RvError::CryptokiNotInitialized] {
            let read = |object| if object == 2 { Err(error(lost)) } else { Ok(Some(object)) };
            assert_eq!(read_each(vec![1, 2, 3], read), Err(error(lost)));
        }
    }

    #[test]
    fn an_object_that_cannot_be_read_once_is_read_again() {
        let reads = std::cell::Cell::new(0);
        let read = |object| {
            reads.set(reads.get() + 1);
            if reads.get() == 2 { Err(error(RvError::FunctionFailed)) } else { Ok(Some(object)) }
        };
        assert_eq!(read_each(vec![1, 2, 3], read), Ok((vec![1, 2, 3], vec![])));
    }
}
