//! The machine of a measurement.

use serde::Serialize;
use time::OffsetDateTime;
use time::macros::format_description;

/// The machine and the date, without which figures mean nothing.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Name of the processor.
    pub processor: String,
    /// Number of processors for this process.
    pub processors: usize,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// The day, in UTC: 2026-01-31.
    pub date: String,
    /// Whether the program was built with optimisation. Without it, the figures only show that the program works.
    pub optimised: bool,
}

impl Machine {
    /// This machine, today.
    #[must_use]
    pub fn here() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal").and_then(|kib| kib.strip_suffix(" kB")?.parse().ok());
        Self {
            processor: field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            processors: processors(),
            memory_bytes: memory.map_or(0, |kib: u64| kib * 1024),
            date: OffsetDateTime::now_utc().format(format_description!("[year]-[month]-[day]")).unwrap_or_default(),
            optimised: !cfg!(debug_assertions),
        }
    }
}

/// Number of processors for this process.
#[must_use]
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}
