//! Formats protectors and certificates for people and for programs.

use claviger_protocol::certificate::Certificate;
use claviger_protocol::describe::{DescribedSignature, DescribedWrapping, Description, SignatureState};
use serde_json::{Value, json};

use super::pinning;
use crate::cli::table::{date, plain};
use crate::sys::clock::unix_now;
use crate::sys::print::say;

fn subject(certificate: &Certificate) -> String {
    // Limit the length of names.
    let name: String = certificate.common_name().unwrap_or("(no common name)").chars().take(200).collect();
    plain(&name).replace('\n', " ")
}

/// Formats a certificate as one line.
pub(super) fn certificate_for_people(certificate: &Certificate) -> String {
    let expired = if certificate.not_after() < unix_now() { " (EXPIRED)" } else { "" };
    format!(
        "{}, RSA {}, until {}{expired}, SHA-256 {}",
        subject(certificate),
        certificate.key().modulus_len() * 8,
        date(certificate.not_after()),
        pinning::thumbprint(certificate)
    )
}

pub(super) fn certificate_json(certificate: &Certificate) -> Value {
    json!({
        "subject": certificate.common_name(),
        "bits": certificate.key().modulus_len() * 8,
        "not_before": certificate.not_before(),
        "not_after": certificate.not_after(),
        "thumbprint": pinning::thumbprint(certificate),
    })
}

/// Result of checking the transport-key signature.
#[derive(Clone, PartialEq, Eq)]
pub(in crate::cli) enum Opened {
    /// It was not checked.
    NotTried,
    /// The protector can be opened and the signature is valid.
    Holds,
    /// No wrapping belongs to the given owner.
    NotOurs,
    /// The protector cannot be opened, or the signature is wrong; holds the reason.
    Failed(String),
}

/// Prints a protector as a tree.
pub(in crate::cli) fn show(description: &Description, opened: &Opened) {
    match (&description.verdict, opened) {
        (Ok(()), Opened::Failed(_)) => say!("protector: NOT VALID"),
        (Ok(()), _) => say!("protector of {} wrappings: valid", description.wrappings.len()),
        (Err(refusal), _) => say!("protector: NOT VALID\n  {}", plain(&refusal.to_string())),
    }
    if !description.readable {
        return;
    }
    match description.max_offline_unwraps {
        Some(0) => {}
        Some(unwraps) => say!("  offline unwraps  {unwraps} (no signature covers this number)"),
        None => say!("  offline unwraps  NOT A NUMBER"),
    }
    let signer = description.guardian.map_or("?".to_owned(), |id| id.to_string());
    say!("  written by wrapping {signer}: guardian signature {}", signature(&description.guardian_signature));
    let transport = match opened {
        Opened::NotTried => "not checked: only who can open it can (--owner)".to_owned(),
        Opened::NotOurs => "not checked: no wrapping is for this owner".to_owned(),
        Opened::Holds => "holds".to_owned(),
        Opened::Failed(why) => format!("DOES NOT HOLD: {why}"),
    };
    let uri = description.transport_key_signature.as_deref().unwrap_or("no algorithm");
    let derivation = description.key_derivation.as_deref().unwrap_or("no algorithm");
    say!("  transport-key signature {transport}");
    say!("    {}, key by {}", plain(uri), plain(derivation));
    for wrapping in &description.wrappings {
        show_wrapping(wrapping);
    }
    if description.wrappings_left_out > 0 {
        say!("  … and {} more wrappings", description.wrappings_left_out);
    }
}

fn show_wrapping(wrapping: &DescribedWrapping) {
    let number = |id: Option<u32>| id.map_or("?".to_owned(), |id| id.to_string());
    let role = if wrapping.is_owner() {
        "owner".to_owned()
    } else {
        format!("guardian, let in by {}", number(wrapping.parent))
    };
    say!("  wrapping {}: {role}", number(wrapping.id));
    for (role, certificate, by) in [
        ("signing", &wrapping.signing, &wrapping.signing_signature),
        ("encryption", &wrapping.encryption, &wrapping.encryption_signature),
    ] {
        match certificate {
            Ok(certificate) => say!("    {role:10}  {}", certificate_for_people(certificate)),
            Err(why) => say!("    {role:10}  CANNOT BE USED: {}", plain(why)),
        }
        say!("    {:10}  its signature {}", "", signature(by));
    }
    say!("    key         {}", plain(wrapping.algorithm.as_deref().unwrap_or("NO ALGORITHM")));
}

fn signature(signature: &DescribedSignature) -> String {
    let uri = signature.algorithm.as_deref().map(|uri| format!(" ({})", plain(uri))).unwrap_or_default();
    match &signature.state {
        SignatureState::Holds => format!("holds{uri}"),
        SignatureState::Wrong => format!("is WRONG{uri}"),
        SignatureState::Unchecked(why) => format!("CANNOT BE CHECKED: {}{uri}", plain(why)),
    }
}

/// A protector as JSON.
pub(in crate::cli) fn to_json(description: &Description, opened: &Opened) -> Value {
    let problem = description.verdict.as_ref().err();
    let transport = match opened {
        Opened::NotTried | Opened::NotOurs => json!({ "state": "unchecked" }),
        Opened::Holds => json!({ "state": "holds" }),
        Opened::Failed(why) => json!({ "state": "wrong", "problem": why }),
    };
    json!({
        "valid": problem.is_none() && !matches!(opened, Opened::Failed(_)),
        "problem": problem.map(|refusal| json!({ "code": refusal.code.as_str(), "message": refusal.message })),
        "max_offline_unwraps": description.max_offline_unwraps,
        "guardian_signature":
            with(signature_json(&description.guardian_signature), "wrapping", json!(description.guardian)),
        "transport_key_signature": with(
            with(transport, "algorithm", json!(description.transport_key_signature)),
            "key_derivation",
            json!(description.key_derivation),
        ),
        "wrappings": description.wrappings.iter().map(wrapping_json).collect::<Vec<_>>(),
        "wrappings_left_out": description.wrappings_left_out,
    })
}

fn wrapping_json(wrapping: &DescribedWrapping) -> Value {
    let certificate = |certificate: &Result<Certificate, String>, by: &DescribedSignature| {
        let said = match certificate {
            Ok(certificate) => certificate_json(certificate),
            Err(why) => json!({ "problem": why }),
        };
        with(said, "signature", signature_json(by))
    };
    json!({
        "id": wrapping.id,
        "parent": wrapping.parent,
        "owner": wrapping.is_owner(),
        "algorithm": wrapping.algorithm,
        "signing": certificate(&wrapping.signing, &wrapping.signing_signature),
        "encryption": certificate(&wrapping.encryption, &wrapping.encryption_signature),
    })
}

fn signature_json(signature: &DescribedSignature) -> Value {
    let (state, problem) = match &signature.state {
        SignatureState::Holds => ("holds", None),
        SignatureState::Wrong => ("wrong", None),
        SignatureState::Unchecked(why) => ("unchecked", Some(why)),
    };
    json!({ "algorithm": signature.algorithm, "state": state, "problem": problem })
}

fn with(mut object: Value, name: &str, value: Value) -> Value {
    object[name] = value;
    object
}
