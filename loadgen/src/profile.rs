//! The load profile: the times at which requests start. A plain value and an iterator, without a clock.
//!
//! ```text
//! 10s@100,1m@500,30s@500..2000,20s@3000     constant, constant, a ramp, constant; releases a second
//! storm:10000/60s                           10,000 machines, each once, evenly within 60 s
//! ```

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;

use crate::units;

/// Longest run. A health certificate is valid for eight hours and starts five minutes in the past, and a host attests
/// only once in a run.
pub const LONGEST: Duration = Duration::from_secs(7 * 3600);
/// Largest number of starts in a run. It catches a typing error early.
const MOST: f64 = 1e9;

/// A part of a profile: the rate changes linearly from one value to another.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Segment {
    /// Duration of the segment.
    pub duration: Duration,
    /// Releases a second at the start.
    pub from: f64,
    /// Releases a second at the end; the same as `from` for a constant rate.
    pub to: f64,
}

/// How releases of a rate follow each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Arrivals {
    /// Evenly: always as far apart
    Even,
    /// At random, as hosts that know nothing of each other ask; the same each time
    Random,
}

impl Arrivals {
    /// The name on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Even => "even",
            Self::Random => "random",
        }
    }

    /// Number of releases between two starts, for `all` releases in requests of `batch` each. `Even` returns the same
    /// number each time. `Random` returns the gaps of a Poisson process that is conditioned on its number of events, so
    /// the total is always `all`.
    fn gaps(self, all: f64, batch: f64) -> impl FnMut() -> f64 + Send + 'static {
        let gap = |lots: &mut fastrand::Rng| -(1.0 - lots.f64()).ln();
        let mut lots = fastrand::Rng::with_seed(11);
        let mut again = lots.clone();
        let scale = match self {
            Self::Even => 0.0,
            Self::Random => all / (0..=(all / batch).round() as u64).map(|_| gap(&mut again)).sum::<f64>(),
        };
        move || match self {
            Self::Even => batch,
            Self::Random => gap(&mut lots) * scale,
        }
    }
}

/// The requested load.
#[derive(Clone, PartialEq, Debug)]
pub enum Profile {
    /// Rates that do not depend on the server's replies.
    Rates(Vec<Segment>),
    /// A boot storm: each machine once, evenly over the time.
    Storm {
        /// Number of virtual machines.
        machines: usize,
        /// The time in which all machines are requested.
        within: Duration,
    },
}

impl Segment {
    /// Number of starts in the first `seconds` of the segment.
    fn starts_by(&self, seconds: f64) -> f64 {
        let length = self.duration.as_secs_f64();
        self.from * seconds + (self.to - self.from) * seconds * seconds / (2.0 * length)
    }

    fn starts(&self) -> f64 {
        (self.from + self.to) / 2.0 * self.duration.as_secs_f64()
    }

    /// The time of a start: the inverse of [`Self::starts_by`].
    fn when(&self, starts: f64) -> f64 {
        let slope = (self.to - self.from) / self.duration.as_secs_f64();
        if slope == 0.0 {
            return starts / self.from;
        }
        if starts <= 0.0 {
            return 0.0;
        }
        // This form of the solution does not subtract nearly equal numbers.
        let root = (self.from * self.from + 2.0 * slope * starts).max(0.0).sqrt();
        2.0 * starts / (self.from + root)
    }
}

impl Profile {
    /// A profile with one constant rate.
    #[must_use]
    pub fn constant(duration: Duration, rate: f64) -> Self {
        Self::Rates(vec![Segment { duration, from: rate, to: rate }])
    }

    /// The time from the first start to the end of the load.
    #[must_use]
    pub fn duration(&self) -> Duration {
        match self {
            Self::Rates(segments) => segments.iter().map(|segment| segment.duration).sum(),
            Self::Storm { within, .. } => *within,
        }
    }

    /// The rate at the start, in releases a second.
    #[must_use]
    pub(crate) fn first_rate(&self) -> f64 {
        match self {
            Self::Rates(segments) => segments.first().map_or(0.0, |segment| segment.from.max(1.0)),
            Self::Storm { machines, within } => *machines as f64 / within.as_secs_f64(),
        }
    }

    /// The start times of releases, relative to the start of the profile. With a `batch` above one, the start times of
    /// the requests.
    ///
    /// A storm is always even.
    pub fn starts(&self, batch: usize, arrivals: Arrivals) -> impl Iterator<Item = Duration> + Send + 'static {
        let segments = match self {
            Self::Rates(segments) => segments.clone(),
            Self::Storm { machines, within } => {
                let rate = *machines as f64 / within.as_secs_f64();
                vec![Segment { duration: *within, from: rate, to: rate }]
            }
        };
        let arrivals = if matches!(self, Self::Storm { .. }) { Arrivals::Even } else { arrivals };
        let mut gap = arrivals.gaps(segments.iter().map(Segment::starts).sum(), batch.max(1) as f64);
        let (mut at, mut begins, mut before) = (0, 0.0, 0.0);
        let mut count = if arrivals == Arrivals::Even { 0.0 } else { gap() };
        std::iter::from_fn(move || {
            loop {
                let segment: &Segment = segments.get(at)?;
                let within = count - before;
                // Rounding must neither lose nor add a start between two segments.
                if within < segment.starts() - 1e-6 {
                    let moment = begins + segment.when(within);
                    count += gap();
                    return Some(Duration::from_secs_f64(moment));
                }
                begins += segment.duration.as_secs_f64();
                before += segment.starts();
                at += 1;
            }
        })
    }

    /// Number of starts in the first `seconds` of the profile. A server that keeps up has received this number of
    /// releases by then.
    #[must_use]
    pub(crate) fn starts_by(&self, seconds: f64) -> f64 {
        match self {
            Self::Rates(segments) => {
                let mut begins = 0.0;
                let mut sum = 0.0;
                for segment in segments {
                    let length = segment.duration.as_secs_f64();
                    sum += segment.starts_by((seconds - begins).clamp(0.0, length));
                    begins += length;
                }
                sum
            }
            Self::Storm { machines, within } => *machines as f64 * (seconds / within.as_secs_f64()).clamp(0.0, 1.0),
        }
    }
}

impl FromStr for Profile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let help = "write it like 10s@100,30s@500..2000 or storm:10000/60s";
        let profile = if let Some(storm) = text.trim().strip_prefix("storm:") {
            let (machines, within) = storm.split_once('/').ok_or_else(|| format!("{text:?} is no storm; {help}"))?;
            let machines: usize =
                machines.trim().parse().map_err(|_| format!("{machines:?} is no number of machines; {help}"))?;
            Self::Storm { machines, within: units::duration(within)? }
        } else {
            let segment = |part: &str| {
                let (duration, rates) = part.split_once('@').ok_or_else(|| format!("{part:?} has no '@'; {help}"))?;
                let (from, to) = rates.split_once("..").unwrap_or((rates, rates));
                let ramp = from != to;
                // A ramp may start or end at zero.
                let bound = |text: &str| if ramp && text.trim() == "0" { Ok(0.0) } else { units::rate(text) };
                Ok::<_, String>(Segment { duration: units::duration(duration)?, from: bound(from)?, to: bound(to)? })
            };
            Self::Rates(text.split(',').map(segment).collect::<Result<_, _>>()?)
        };
        let starts = profile.starts_by(f64::MAX);
        let empty = match &profile {
            Self::Rates(segments) => segments.iter().any(|segment| segment.duration.is_zero()),
            Self::Storm { machines, within } => *machines == 0 || within.is_zero(),
        };
        if empty {
            return Err(format!("{text:?} asks for nothing; {help}"));
        }
        if profile.duration() > LONGEST {
            return Err(format!(
                "{text:?} is longer than 7 hours, and the hosts' health certificates live 8; make it shorter"
            ));
        }
        if starts > MOST {
            return Err(format!("{text:?} asks for {starts:.0} releases; more than {MOST:.0} is surely a mistake"));
        }
        Ok(profile)
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Storm { machines, within } => write!(f, "storm:{machines}/{}s", within.as_secs_f64()),
            Self::Rates(segments) => {
                for (at, segment) in segments.iter().enumerate() {
                    let comma = if at > 0 { "," } else { "" };
                    write!(f, "{comma}{}s@{}", segment.duration.as_secs_f64(), segment.from)?;
                    if segment.from != segment.to {
                        write!(f, "..{}", segment.to)?;
                    }
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn profile(text: &str) -> Profile {
        text.parse().unwrap()
    }

    fn starts(text: &str, batch: usize) -> Vec<f64> {
        profile(text).starts(batch, Arrivals::Even).map(|moment| moment.as_secs_f64()).collect()
    }

    #[test]
    fn what_is_written_is_what_is_meant() {
        let second = Duration::from_secs(1);
        let constant = |seconds: u32, rate| Segment { duration: second * seconds, from: rate, to: rate };
        let expected = vec![
            constant(10, 100.0),
            constant(60, 500.0),
            Segment { duration: 30 * second, from: 500.0, to: 2000.0 },
            constant(20, 3000.0),
        ];
        let read = profile("10s@100, 1m@500/s,30s@500..2000,20s@3000");
        assert_eq!(read, Profile::Rates(expected));
        assert_eq!(read.duration(), 120 * second);
        assert_eq!(profile(&read.to_string()), read);
        let storm = profile("storm:10000/60s");
        assert_eq!(storm, Profile::Storm { machines: 10_000, within: 60 * second });
        assert_eq!(profile(&storm.to_string()), storm);
    }

    #[test]
    fn random_arrivals_keep_the_rate_and_are_the_same_each_time() {
        let moments = |batch| {
            let starts = profile("20s@500,10s@100..900").starts(batch, Arrivals::Random);
            starts.map(|moment| moment.as_secs_f64()).collect::<Vec<_>>()
        };
        let random = moments(1);
        assert_eq!(random, moments(1));
        assert!(random.is_sorted() && random.iter().all(|moment| *moment < 30.0));
        // The standard deviation of random gaps equals their mean.
        assert!((14_999..=15_000).contains(&random.len()), "{}", random.len());
        let gaps: Vec<_> = random.windows(2).take(9_000).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((0.9..1.1).contains(&(deviation / mean)), "{mean} {deviation}");
        assert!((3_749..=3_750).contains(&moments(4).len()), "{}", moments(4).len());
        let storm = profile("storm:10/1s");
        assert!(storm.starts(1, Arrivals::Random).eq(storm.starts(1, Arrivals::Even)));
    }

    #[test]
    fn mistakes_are_explained() {
        for (text, expected) in [
            ("", "has no '@'; write it like 10s@100"),
            ("10s", "has no '@'"),
            ("10@100", "is not a duration; write it like 50ms"),
            ("10s@", "is not a rate; write a number of releases a second"),
            ("10s@0", "is not a rate"),
            ("0s@10", "asks for nothing"),
            ("10s@1..x", "is not a rate"),
            ("storm:10", "is no storm; write it like"),
            ("storm:x/60s", "is no number of machines"),
            ("storm:0/60s", "asks for nothing"),
            ("8h@1", "longer than 7 hours"),
            ("1h@1000000", "surely a mistake"),
        ] {
            let message = text.parse::<Profile>().unwrap_err();
            assert!(message.contains(expected), "{text}: {message}");
        }
    }

    #[test]
    fn a_constant_rate_is_even() {
        assert_eq!(starts("1s@4", 1), [0.0, 0.25, 0.5, 0.75]);
        assert_eq!(starts("1s@4,1s@2", 1), [0.0, 0.25, 0.5, 0.75, 1.0, 1.5]);
        assert_eq!(starts("1s@8", 4), [0.0, 0.5]);
        assert_eq!(starts("storm:6/3s", 1), [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]);
    }

    #[test]
    fn a_ramp_has_as_many_as_its_area_and_gets_denser() {
        let starts = starts("10s@0..100", 1);
        assert_eq!(starts.len(), 500);
        assert_eq!(starts.iter().filter(|moment| **moment < 5.0).count(), 125);
        let gaps: Vec<f64> = starts.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.is_sorted_by(|a, b| a >= b));
    }

    proptest! {
        #[test]
        fn starts_are_in_order_and_as_many_as_promised(
            parts in proptest::collection::vec((1_u32..50, 1_u32..500, 1_u32..500), 1..6), batch in 1_usize..9,
        ) {
            let segment = |&(tenths, from, to): &(u32, u32, u32)| Segment {
                duration: Duration::from_millis(100) * tenths, from: f64::from(from), to: f64::from(to),
            };
            let profile = Profile::Rates(parts.iter().map(segment).collect());
            let starts: Vec<f64> = profile.starts(batch, Arrivals::Even).map(|moment| moment.as_secs_f64()).collect();
            prop_assert!(starts.is_sorted());
            let end = profile.duration().as_secs_f64();
            prop_assert!(starts.iter().all(|moment| *moment <= end));
            let promised = profile.starts_by(end) / batch as f64;
            prop_assert!((starts.len() as f64 - promised).abs() <= 1.0, "{} for {}", starts.len(), promised);
        }
    }
}
