//! Policies: the conditions that a host's boot has to meet.

use super::log::Log;
use super::pcr::{PcrSet, PcrValues};

/// A policy. All policies are always enforced.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Policy {
    /// Secure Boot was on when the firmware started.
    SecureBootEnabled,
    /// The host booted an accepted configuration: its PCRs match an enabled baseline.
    SecureBootSettings,
    /// The host has neither slept nor hibernated since it was switched on.
    FullBoot,
}

impl Policy {
    /// All policies, in the order in which failures are reported.
    pub const ALL: [Self; 3] = [Self::SecureBootEnabled, Self::SecureBootSettings, Self::FullBoot];

    /// The policy's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SecureBootEnabled => "SecureBootEnabled",
            Self::SecureBootSettings => "SecureBootSettings",
            Self::FullBoot => "FullBoot",
        }
    }

    /// The policy's GUID in its wire format: 16 bytes, the first three fields little-endian.
    #[must_use]
    pub fn guid(self) -> [u8; 16] {
        match self {
            // 6a460ee1-62ea-416f-ae6c-04e29634506d
            Self::SecureBootEnabled => {
                [0xe1, 0x0e, 0x46, 0x6a, 0xea, 0x62, 0x6f, 0x41, 0xae, 0x6c, 0x04, 0xe2, 0x96, 0x34, 0x50, 0x6d]
            }
            // 756dc455-9528-479a-a86a-c646417316c9
            Self::SecureBootSettings => {
                [0x55, 0xc4, 0x6d, 0x75, 0x28, 0x95, 0x9a, 0x47, 0xa8, 0x6a, 0xc6, 0x46, 0x41, 0x73, 0x16, 0xc9]
            }
            // 75ad09c9-7254-4d00-96f3-3b09d0aaac54
            Self::FullBoot => {
                [0xc9, 0x09, 0xad, 0x75, 0x54, 0x72, 0x00, 0x4d, 0x96, 0xf3, 0x3b, 0x09, 0xd0, 0xaa, 0xac, 0x54]
            }
        }
    }

    /// The policy with this GUID.
    #[must_use]
    pub fn from_guid(guid: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.guid() == guid)
    }
}

/// PCR values that an administrator accepted under a name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Baseline {
    /// The baseline's name.
    pub name: String,
    /// The PCR values; at least those of [`Baseline::REQUIRED`].
    pub values: PcrValues,
}

impl Baseline {
    /// The PCRs that every baseline contains: firmware, boot loader, Secure Boot.
    pub const REQUIRED: [usize; 3] = [0, 4, 7];

    /// Whether the quoted values include all values of this baseline.
    #[must_use]
    pub fn matches(&self, quoted: &PcrValues) -> bool {
        self.values.iter().all(|(pcr, value)| quoted.get(pcr) == Some(value))
    }
}

/// The PCRs that hosts have to quote while these baselines are enabled.
#[must_use]
pub fn selection<'a>(baselines: impl IntoIterator<Item = &'a Baseline>) -> PcrSet {
    baselines.into_iter().fold(PcrSet::ALWAYS, |set, baseline| set.union(baseline.values.set_of()))
}

/// The result of all policies for one host. Each policy is judged independently.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verdict<'a> {
    /// The failed policies, in the order of [`Policy::ALL`].
    pub failed: Vec<Policy>,
    /// The first matching enabled baseline, by name.
    pub baseline: Option<&'a Baseline>,
}

/// Judges a host by its log, its quoted values and the quote's restart count. The log must replay to the values.
#[must_use]
pub fn judge<'a>(
    log: &Log<'_>,
    quoted: &PcrValues,
    restart_count: u32,
    enabled: impl IntoIterator<Item = &'a Baseline>,
) -> Verdict<'a> {
    let baseline = enabled
        .into_iter()
        .filter(|baseline| baseline.matches(quoted))
        .min_by(|a, b| a.name.as_bytes().cmp(b.name.as_bytes()));
    let holds = |policy: &Policy| match policy {
        Policy::SecureBootEnabled => log.first_extension(7).is_some_and(|event| event.is_secure_boot_on()),
        Policy::SecureBootSettings => baseline.is_some(),
        Policy::FullBoot => restart_count == 0,
    };
    Verdict { failed: Policy::ALL.into_iter().filter(|policy| !holds(policy)).collect(), baseline }
}
