//! Releases with a stock: they need one operation, each item is used once, and all items are dropped when something
//! they depend on changes.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;

use super::*;
use crate::registry::keys::Keys;
use crate::release::stocker;
use crate::stock::{Basis, MACHINES_FOR_A_RELEASE, Stock};

/// Items for a set that had one release.
const ITEMS: usize = MACHINES_FOR_A_RELEASE as usize;

/// Runs a release without its audit record, which a thread writes that a paused clock does not wait for.
async fn served(stage: &Stage, body: &[u8]) -> Result<RollResponse, Refusal> {
    super::asked(stage, body, &mut attempt()).await.and_then(|grant| grant.confirm(&stage.service))
}

/// A protector whose set had this many releases.
async fn asked(stage: &Stage, releases: usize) -> Vec<u8> {
    let mut protector = stage.protector();
    for _ in 0..releases {
        protector = served(stage, &stage.request(&protector).to_xml()).await.unwrap().egress_protector;
    }
    protector
}

fn operations(stage: &Stage) -> [usize; 2] {
    [Operation::Decrypt, Operation::Sign].map(|kind| stage.hsm.asked(kind))
}

fn depth(stage: &Stage) -> usize {
    stage.service.stock.depth()
}

fn sweep(stage: &Stage, limit: usize) {
    while !stage.service.stock.sweep(limit) {}
}

async fn fill(stage: &Stage) -> usize {
    stocker::fill_up(&stage.service, &stage.hsm).await
}

#[tokio::test]
async fn with_a_stock_a_release_takes_one_operation_and_gives_as_much() {
    let (_folder, stage) = stage();
    let mut protector = asked(&stage, 1).await;
    assert_eq!(operations(&stage), [1, 1]);
    assert_eq!(fill(&stage).await, ITEMS, "one for each machine that the release stands for");
    assert_eq!(operations(&stage), [1, 1 + ITEMS]);
    let mut given = HashSet::new();
    for round in 1..=ITEMS + 1 {
        let response = served(&stage, &stage.request(&protector).to_xml()).await.unwrap();
        let keys = stage.open(&response);
        for party in [stage.owner(), stage.guardian()] {
            assert_eq!(*party.open(&protector).unwrap(), *keys.ingress);
            assert_eq!(*party.open(&response.egress_protector).unwrap(), *keys.egress);
        }
        assert!(given.insert(*keys.egress), "each is given out once");
        assert_eq!(depth(&stage), ITEMS.saturating_sub(round));
        // The last release finds the stock empty.
        assert_eq!(operations(&stage), [1 + round, 1 + ITEMS + round / (ITEMS + 1)]);
        protector = response.egress_protector;
    }
}

#[tokio::test]
async fn machines_of_one_owner_share_a_stock_and_other_owners_do_not() {
    let (_folder, stage) = stage();
    asked(&stage, 1).await;
    fill(&stage).await;
    // The same parties with another transport key.
    served(&stage, &stage.request(&stage.protector()).to_xml()).await.unwrap();
    assert_eq!((operations(&stage), depth(&stage)), ([2, 1 + ITEMS], ITEMS - 1));
    let two = stage.owner().create(&[stage.metadata(), stage.metadata()]).unwrap().0;
    served(&stage, &stage.request(&two).to_xml()).await.unwrap();
    assert_eq!((operations(&stage), depth(&stage)), ([3, 2 + ITEMS], ITEMS - 1));
}

#[tokio::test(start_paused = true)]
async fn a_refused_release_leaves_the_stock_as_it_was_and_takes_as_long() {
    let (_folder, stage) = stage();
    asked(&stage, 1).await;
    let wrong = stage.request(&with_wrong_key(&stage)).to_xml();
    let refused = async || {
        let begun = standstill::now();
        let refusal = served(&stage, &wrong).await.unwrap_err();
        (refusal.code, refusal.message, standstill::since(begun))
    };
    let without = refused().await;
    assert_eq!(fill(&stage).await, ITEMS);
    let before = operations(&stage);
    assert_eq!(refused().await, without);
    assert_eq!((operations(&stage), depth(&stage)), ([before[0] + 1, before[1]], ITEMS));
    // A failing HSM does not use up an item.
    stage.hsm.plan(Operation::Decrypt, Incident::Fails);
    assert!(served(&stage, &stage.request(&stage.protector()).to_xml()).await.is_err());
    assert_eq!(depth(&stage), ITEMS);
}

#[tokio::test]
async fn a_change_of_keys_labels_or_settings_empties_it_at_once() {
    for withdrawal in Withdrawal::ALL {
        let (_folder, stage) = stage();
        let protector = asked(&stage, 1).await;
        assert_eq!(fill(&stage).await, ITEMS);
        withdrawal.set(&stage.service, true);
        let kept = matches!(withdrawal, Withdrawal::Host | Withdrawal::Signer);
        assert_eq!(depth(&stage), if kept { ITEMS } else { 0 }, "{withdrawal:?}");
        let refusal = served(&stage, &stage.request(&protector).to_xml()).await.unwrap_err();
        assert_eq!(refusal.code, withdrawal.code());
        if matches!(withdrawal, Withdrawal::EncryptionKey | Withdrawal::SigningKey) {
            assert_eq!(fill(&stage).await, 0, "nothing is made for a key that is not held");
        }
    }
    let (_folder, stage) = stage();
    let protector = asked(&stage, 1).await;
    assert_eq!(fill(&stage).await, ITEMS);
    configure(&stage.service, |config| config.release.max_offline_unwraps = 3);
    // A release that starts before the stock knows about the change has its own settings and does not use the stock.
    let response = served(&stage, &stage.request(&protector).to_xml()).await.unwrap();
    assert_eq!(Protector::parse(&response.egress_protector).unwrap().max_offline_unwraps, 3);
    assert_eq!(depth(&stage), ITEMS);
    stage.service.rebase_stock();
    assert_eq!(depth(&stage), 0);
    assert_eq!(fill(&stage).await, 2 * ITEMS);
    let response = served(&stage, &stage.request(&response.egress_protector).to_xml()).await.unwrap();
    assert_eq!(Protector::parse(&response.egress_protector).unwrap().max_offline_unwraps, 3);
    assert_eq!(depth(&stage), 2 * ITEMS - 1);
}

/// While the first call reads the current settings, they change and a second call begins. If the first call did not
/// hold the lock by then, the second call would end first, and the first one would then use the old settings.
#[test]
fn of_two_rebases_at_the_same_time_the_newer_basis_stays() {
    let (stock, keys) = (&Stock::default(), Arc::new(Keys::default()));
    let unwraps = AtomicU32::new(1);
    let in_force = &|| {
        let mut config = Config::default();
        config.release.max_offline_unwraps = unwraps.load(Ordering::SeqCst);
        Basis::new(&keys, &config)
    };
    std::thread::scope(|scope| {
        stock.rebase(|| {
            let read = in_force();
            unwraps.store(2, Ordering::SeqCst);
            let (done, is_done) = mpsc::channel();
            scope.spawn(move || {
                stock.rebase(in_force);
                // Nobody listens any more where this had to wait, as it should.
                let _ = done.send(());
            });
            // The second call must wait for the first one. A correct stock waits here for the whole of this time.
            let _ = is_done.recv_timeout(Duration::from_millis(200));
            read
        });
    });
    assert!(stock.is_based_on(&in_force()));
}

#[tokio::test]
async fn a_key_that_is_withdrawn_while_an_item_is_made_keeps_it_out() {
    let (_folder, stage) = stage();
    asked(&stage, 1).await;
    let service = Arc::clone(&stage.service);
    stage.hsm.plan(Operation::Sign, Incident::meanwhile(move || Withdrawal::SigningKey.set(&service, true)));
    assert_eq!(fill(&stage).await, 0);
    Withdrawal::SigningKey.set(&stage.service, false);
    assert_eq!(depth(&stage), 0, "what was made for the keys of before stays out");
}

#[tokio::test(start_paused = true)]
async fn what_an_hsm_signs_wrong_never_enters() {
    let (_folder, stage) = stage();
    asked(&stage, 1).await;
    for incident in [Incident::IsWrong, Incident::Fails] {
        stage.hsm.plan(Operation::Sign, incident);
        assert_eq!(fill(&stage).await, 0, "the set rests");
        tokio::time::advance(Duration::from_secs(6)).await;
    }
    assert_eq!(fill(&stage).await, ITEMS);
}

#[tokio::test(start_paused = true)]
async fn an_item_waits_for_ten_minutes_at_most() {
    let (_folder, stage) = stage();
    let protector = asked(&stage, 1).await;
    assert_eq!(fill(&stage).await, ITEMS);
    tokio::time::advance(Duration::from_secs(479)).await;
    sweep(&stage, usize::MAX);
    assert_eq!(depth(&stage), ITEMS);
    tokio::time::advance(Duration::from_secs(121)).await;
    let before = operations(&stage);
    let request = RollRequest { health_certificate: stage.health_certificate(unix_now()), ..stage.request(&protector) };
    served(&stage, &request.to_xml()).await.unwrap();
    assert_eq!((operations(&stage), depth(&stage)), ([before[0] + 1, before[1] + 1], 0));
    assert_eq!(fill(&stage).await, 2 * ITEMS);
    tokio::time::advance(Duration::from_secs(600)).await;
    sweep(&stage, usize::MAX);
    assert_eq!(depth(&stage), 0);
}

#[tokio::test]
async fn it_is_filled_while_sessions_are_idle_and_no_release_waits() {
    let (_folder, stage) = stage_with(|config| config.release.concurrency = 1);
    asked(&stage, 1).await;
    stage.hsm.set_idle(0);
    assert_eq!(fill(&stage).await, 0);
    stage.hsm.set_idle(1);
    let runs = stage.service.admission.turn(&host(), &attempt(), b"a request").await.unwrap();
    let service = Arc::clone(&stage.service);
    let waits = tokio::spawn(async move { service.admission.turn(&host(), &attempt(), b"a request").await.map(drop) });
    while stage.service.admission.load().waiting == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(fill(&stage).await, 0);
    drop(runs);
    waits.await.unwrap().unwrap();
    assert_eq!(fill(&stage).await, ITEMS);
}

#[tokio::test]
async fn it_keeps_to_its_memory() {
    let (_folder, stage) = stage_with(|config| config.release.stock_mib = 0);
    asked(&stage, 2).await;
    assert_eq!(fill(&stage).await, 0, "0 makes none ahead");
    assert!(stage.service.stock.worth(1).is_empty(), "and keeps no set");
    configure(&stage.service, |config| config.release.stock_mib = 1);
    asked(&stage, 2).await;
    let set = stage.service.stock.worth(1).remove(0).set;
    stage.service.stock.asked(&set, 2_000.0, 64 << 20);
    let most = fill(&stage).await;
    assert!((300..700).contains(&most), "{most} items of an owner and a guardian in a mebibyte");
    sweep(&stage, 1024 * 1024 / 2);
    assert!((most * 2 / 5..=most * 3 / 5).contains(&depth(&stage)), "{}", depth(&stage));
    sweep(&stage, 0);
    assert_eq!(depth(&stage), 0);
}

#[tokio::test]
async fn sets_are_bounded_by_bytes_since_their_senders_choose_their_size() {
    let (_folder, stage) = stage();
    asked(&stage, 2).await;
    let set = stage.service.stock.worth(1).remove(0).set;
    let stock = Stock::default();
    stock.asked(&set, 1.0, set.memory() * 2 - 2);
    assert!(stock.worth(1).is_empty(), "a set takes more than half of the stock");
    stock.asked(&set, 1.0, set.memory() * 2);
    assert_eq!(stock.worth(1).len(), 1);
    // A set with another guardian: the limit allows one item of each.
    let two = stage.owner().create(&[stage.metadata(), stage.metadata()]).unwrap().0;
    served(&stage, &stage.request(&two).to_xml()).await.unwrap();
    let both = stage.service.stock.worth(2).into_iter().map(|worth| worth.set);
    let larger = both.max_by_key(|set| set.memory()).unwrap();
    assert_ne!(larger.identity(), set.identity());
    stock.asked(&larger, 1.0, larger.memory() * 2);
    assert_eq!(stock.worth(2).iter().map(|worth| worth.set.identity()).collect::<Vec<_>>(), [larger.identity()]);
}

#[tokio::test]
async fn a_service_that_is_started_anew_fills_it_before_the_machines_ask() {
    let (_folder, stage) = stage();
    let protector = asked(&stage, 5).await;
    stocker::remember(&stage.service).await;
    let remembered = stage.service.usage.sets().unwrap();
    assert_eq!(remembered.len(), 1);
    assert!(remembered[0].releases > 4.9 && remembered[0].releases <= 5.0, "{}", remembered[0].releases);
    stocker::remember(&stage.service).await;
    assert_eq!(stage.service.usage.sets().unwrap()[0].document, remembered[0].document);
    // A stock that is switched off forgets its sets, but not the list.
    configure(&stage.service, |config| config.release.stock_mib = 0);
    sweep(&stage, 0);
    stocker::remember(&stage.service).await;
    assert_eq!(stage.service.usage.sets().unwrap().len(), 1);

    let (_folder, started) = self::stage();
    let sets = remembered.iter().map(|set| ([7; 32], set.releases, || set.document.clone()));
    started.service.usage.remember_sets(sets, 1).unwrap();
    let damaged = std::iter::once(([8; 32], 9.0, || b"<Protector/>".to_vec()));
    stocker::recall(&started.service).await;
    assert_eq!(fill(&started).await, 5 * ITEMS);
    let response = served(&started, &started.request(&protector).to_xml()).await.unwrap();
    assert_eq!(operations(&started), [1, 5 * ITEMS]);
    assert_eq!(*started.owner().open(&response.egress_protector).unwrap(), *started.open(&response).egress);

    // Damaged sets are skipped, and sets that are no longer requested are dropped.
    started.service.usage.remember_sets(damaged, 1).unwrap();
    assert_eq!(started.service.usage.sets().unwrap().len(), 1);
    stocker::recall(&started.service).await;
    stocker::remember(&started.service).await;
    assert_eq!(started.service.usage.sets().unwrap()[0].document, remembered[0].document);
}
