//! Whether the snapshots may still be used. With a state that several nodes share, another node may remove a host at any
//! time. A node that cannot reach etcd does not learn of that, so it serves for a limited time only.
//!
//! ```text
//!               no confirmation for CONFIRMED           for max_staleness
//!   Confirmed ──────────────────────────────► Stale ─────────────────────► Expired
//!       ▲                                       │                             │
//!       └────────────── the snapshots are the newest ones again ──────────────┘
//! ```
//!
//! Time is counted from the last confirmation that the state in etcd was the one in the snapshots. While the state is
//! read again, the old snapshots stay in use, and the time goes on.

use std::time::{Duration, Instant};

/// Time since the last confirmation within which a connection counts as intact. The store asks four times a second.
const CONFIRMED: Duration = Duration::from_secs(3);

/// How current the snapshots are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Currency {
    /// The state is on this machine.
    Local,
    /// etcd has confirmed the snapshots just now.
    Confirmed {
        /// Time since the last confirmation.
        age: Duration,
    },
    /// etcd does not confirm them. They are used until the time is over.
    Stale {
        /// Time since the last confirmation.
        age: Duration,
        /// Time for which they may still be used.
        left: Duration,
    },
    /// etcd has not confirmed them for too long: nothing is released.
    Expired {
        /// Time since the last confirmation.
        age: Duration,
    },
}

impl Currency {
    /// The state `limit` after which nothing is released, at `now`.
    pub(super) fn of(confirmed: Instant, limit: Duration, now: Instant) -> Self {
        let age = now.saturating_duration_since(confirmed);
        match limit.checked_sub(age) {
            None => Self::Expired { age },
            Some(_) if age <= CONFIRMED => Self::Confirmed { age },
            Some(left) => Self::Stale { age, left },
        }
    }

    /// Whether nothing may be released.
    #[must_use]
    pub fn is_expired(self) -> bool {
        matches!(self, Self::Expired { .. })
    }

    /// Why nothing may be released, for people.
    #[must_use]
    pub fn why_expired(self) -> Option<String> {
        let Self::Expired { age } = self else { return None };
        let seconds = age.as_secs();
        Some(format!(
            "this node could not confirm the state in etcd for {seconds} s, so it does not know which hosts still may; ask another node"
        ))
    }

    /// Time since the last confirmation; zero for a local state.
    #[must_use]
    pub fn age(self) -> Duration {
        match self {
            Self::Local => Duration::ZERO,
            Self::Confirmed { age } | Self::Stale { age, .. } | Self::Expired { age } => age,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_since_the_last_confirmation_decides() {
        let confirmed = Instant::now();
        let after =
            |seconds| Currency::of(confirmed, Duration::from_secs(10), confirmed + Duration::from_secs(seconds));
        let seconds = Duration::from_secs;
        assert_eq!(after(0), Currency::Confirmed { age: Duration::ZERO });
        assert_eq!(after(3), Currency::Confirmed { age: seconds(3) });
        assert_eq!(after(4), Currency::Stale { age: seconds(4), left: seconds(6) });
        assert_eq!(after(10), Currency::Stale { age: seconds(10), left: Duration::ZERO });
        assert_eq!(after(11), Currency::Expired { age: seconds(11) });
        assert!(after(11).is_expired() && !after(10).is_expired() && !Currency::Local.is_expired());
        // A limit below the time of a lost connection.
        let soon = Currency::of(confirmed, seconds(1), confirmed + seconds(2));
        assert_eq!((soon, soon.age()), (Currency::Expired { age: seconds(2) }, seconds(2)));
    }
}
