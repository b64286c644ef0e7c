//! Machines of many owners, because the daemon caches data per owner.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use claviger::lab::self_signed;
use claviger_loadgen::prepare;
use claviger_protocol::metadata::Metadata;
use claviger_protocol::owner::Owner;
use claviger_protocol::rsa_key::RsaPrivateKey;
use std::sync::Arc;

use crate::machine::processors;

/// Bits of the owners' keys.
const BITS: u32 = 2048;

/// `count` owners with fresh keys.
#[must_use]
pub fn owners(count: usize) -> Vec<Owner> {
    on_all_processors(count, |number| {
        let pair = |role: &str| {
            let key = RsaPrivateKey::generate(BITS).unwrap();
            let certificate = self_signed(&format!("owner {number} {role}"), &key).unwrap();
            (key, certificate)
        };
        let [(signing_key, signing_certificate), (encryption_key, encryption_certificate)] =
            ["signing", "encryption"].map(pair);
        Owner { signing_key, signing_certificate, encryption_key, encryption_certificate }
    })
}

/// `count` machines, whose owners alternate, each with a protector for the guardian.
#[must_use]
pub fn machines(owners: &[Owner], guardian: &Metadata, count: usize) -> Vec<prepare::Machine> {
    on_all_processors(count, |number| {
        let owner = &owners[number % owners.len()];
        let (protector, key) = owner.create(std::slice::from_ref(guardian)).unwrap();
        prepare::Machine { protector: Arc::new(protector), key: Some(key) }
    })
}

/// Makes `count` items, numbered from 0, in this order.
fn on_all_processors<T: Send>(count: usize, make: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let (made, next) = (Mutex::new(Vec::with_capacity(count)), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..processors() {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return;
                    }
                    let thing = make(number);
                    made.lock().unwrap().push((number, thing));
                }
            });
        }
    });
    let mut made = made.into_inner().unwrap();
    made.sort_by_key(|(number, _)| *number);
    made.into_iter().map(|(_, thing)| thing).collect()
}
