//! What the process records, and the page made of it.

use std::sync::OnceLock;

use metrics_exporter_prometheus::PrometheusHandle;

use super::gauges::Readings;

/// Access to what the process recorded.
#[derive(Clone)]
pub struct Handle(PrometheusHandle);

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Handle")
    }
}

impl Handle {
    pub(super) fn of(handle: PrometheusHandle) -> Self {
        Self(handle)
    }

    /// The page for `/metrics`, in the Prometheus text format (`text/plain; version=0.0.4`).
    #[must_use]
    pub fn render(&self, readings: &Readings) -> String {
        let mut page = self.0.render();
        readings.write(&mut page);
        page
    }

    /// Sorts what histograms were told since the last time into their buckets. Until then every value takes memory, also when
    /// nobody ever asks for the page.
    pub fn upkeep(&self) {
        self.0.run_upkeep();
    }
}

pub(super) static INSTALLED: OnceLock<Handle> = OnceLock::new();
