//! Limits for parsing a damaged event log. This test has its own program because it counts all memory of its process.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use claviger_protocol::tpm::context::MAX_LOG;
use claviger_protocol::tpm::log::{Bank, Log};
use peak_alloc::PeakAlloc;
use rustix::time::{ClockId, clock_gettime};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Limit of allocated memory at any moment, in bytes, in addition to the log itself.
const MEMORY: usize = 2 * 1024 * 1024;

/// Limit of processor time for the largest log. Without optimisation the same code takes many times as long.
const TIME: Duration = Duration::from_millis(if cfg!(debug_assertions) { 250 } else { 5 });

/// Attempts before a log counts as slow, because the first one may run with cold caches.
const TRIES: usize = 10;

fn boots() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tpm");
    let read = |name| std::fs::read(folder.join(name)).unwrap();
    ["ovmf-nosb.bin", "ovmf-sb-direct-kernel.bin", "ovmf-sb-uki.bin"].map(read).into()
}

/// Runs every operation on logs.
fn read(bytes: &[u8]) {
    let Ok(log) = Log::parse(bytes) else { return };
    let _ = (log.replay(), log.replay_bank(Bank::Sha1), log.replay_bank(Bank::Sha384));
    log.events().for_each(|event| drop(event.describe()));
    let _ = log.first_extension(7).map(|event| event.is_secure_boot_on());
}

fn processor_time(bytes: &[u8]) -> Duration {
    let now = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap();
    let begun = now();
    read(bytes);
    now() - begun
}

fn check(what: &str, bytes: &[u8]) {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let mut taken = processor_time(bytes);
    let memory = ALLOCATOR.peak_usage().saturating_sub(before);
    assert!(memory <= MEMORY, "{what}: {} bytes took {memory} bytes of memory", bytes.len());
    for _ in 1..TRIES {
        if taken <= TIME {
            return;
        }
        taken = taken.min(processor_time(bytes));
    }
    assert!(taken <= TIME, "{what}: {} bytes took {taken:?} of processor time", bytes.len());
}

/// A single test, so that nothing else allocates at the same time.
#[test]
fn no_mutation_of_a_log_takes_more_than_milliseconds_and_two_mebibytes() {
    for boot in boots() {
        check("as it was recorded", &boot);
        for at in 0..boot.len() {
            let mut log = boot.clone();
            for byte in [0, 0xff, boot[at] ^ 1, boot[at].wrapping_add(1)] {
                log[at] = byte;
                check("a byte", &log);
            }
            check("cut", &boot[..at]);
        }
        // A length or count of four bytes that exceeds the input.
        for at in 0..boot.len() - 4 {
            for number in [u32::MAX, i32::MAX as u32, MAX_LOG as u32, 1 << 16] {
                let mut log = boot.clone();
                log[at..at + 4].copy_from_slice(&number.to_le_bytes());
                check("a number", &log);
            }
        }
        // Repeat a part up to the size of the largest log, to find costs that grow with the square of a count.
        for start in (0..boot.len()).step_by(97) {
            for length in [1, 2, 16, 64, 512, boot.len()] {
                let end = (start + length).min(boot.len());
                let times = (MAX_LOG - boot.len()) / (end - start);
                let log = [&boot[..start], &boot[start..end].repeat(times + 1), &boot[end..]].concat();
                check("a part repeated", &log);
            }
        }
        // Repeat the events after the header many times, so that the log stays well-formed.
        let events = Log::parse(&boot).unwrap().events().count();
        let whole = (1..boot.len()).filter(|end| Log::parse(&boot[..*end]).is_ok()).collect::<Vec<_>>();
        assert!(whole.len() >= events.min(2), "the log has {events} events");
        for ends in whole.windows(2) {
            let event = &boot[ends[0]..ends[1]];
            let times = (MAX_LOG - boot.len()) / event.len();
            let log = [&boot[..ends[1]], &event.repeat(times), &boot[ends[1]..]].concat();
            assert!(Log::parse(&log).is_ok() || times > 10_000, "an event repeated {times} times");
            check("an event repeated", &log);
        }
    }
}
