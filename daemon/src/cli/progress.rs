//! Shows that a command still waits.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Time after which a person wonders whether anything happens.
const PATIENCE: Duration = Duration::from_secs(2);

/// Waits for `work`. At a terminal, a line says for how long already; elsewhere one line says what is waited for.
pub(super) async fn during<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    let (begun, is_terminal) = (Instant::now(), std::io::stderr().is_terminal());
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + PATIENCE, Duration::from_secs(1));
    let mut said = false;
    loop {
        tokio::select! {
            biased;
            done = &mut work => {
                if said && is_terminal {
                    say("\r\x1b[K");
                }
                return done;
            }
            _ = ticks.tick() => {
                if is_terminal {
                    say(&format!("\r{what}, {} s so far", begun.elapsed().as_secs()));
                } else if !said {
                    say(&format!("{what}; this may take minutes\n"));
                }
                said = true;
            }
        }
    }
}

/// A terminal that cannot be written to keeps no command from its work.
fn say(text: &str) {
    let mut out = std::io::stderr();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
