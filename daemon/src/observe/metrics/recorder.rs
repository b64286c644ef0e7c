//! The recorder of the process, and the page of its values.

use std::sync::OnceLock;

use metrics_exporter_prometheus::PrometheusHandle;

use super::gauges::Readings;

/// Handle of the recorder.
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

    /// Sorts recorded values into the histogram buckets. Until then each value takes memory, even if no one requests
    /// the page.
    pub fn upkeep(&self) {
        self.0.run_upkeep();
    }
}

pub(super) static INSTALLED: OnceLock<Handle> = OnceLock::new();
