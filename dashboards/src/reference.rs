//! Generates `docs/metrics.md`: a table of all metrics, from the daemon's own table.

use std::fmt::Write;

use claviger::observe::metrics::{ALL, Kind, SLO_SECONDS};

/// Generates the page. `regenerate` is the command that makes it.
pub(crate) fn markdown(regenerate: &str) -> String {
    let mut page = format!(
        "# Metrics

<!-- Generated from daemon/src/observe/metrics/table.rs: {regenerate} -->

The metrics address (`server.metrics`) serves these metrics at `/metrics`, in the text format of Prometheus. Dashboards,
rules and alerts for them are in `dashboards/`; [runbook.md](runbook.md) has a section for every alert.

- The number of label values is limited: no label names a host, a virtual machine or a protector. `audit.jsonl` names
  them.
- Counters begin at zero when the daemon starts, with all label values that are known by then.
- Gauges of members, sessions, queues and certificates are read at each request for the page.
- A histogram has the series `_bucket` (with the label `le`), `_sum` and `_count`. {SLO_SECONDS} s is a bucket bound
  of the release duration, so the share of releases within the service objective is exact, not interpolated.

| name | type | unit | labels | meaning |
|---|---|---|---|---|
"
    );
    for metric in ALL {
        let kind = match metric.kind {
            Kind::Counter | Kind::CounterReading => "counter",
            Kind::GaugeReading => "gauge",
            Kind::Histogram(_) => "histogram",
        };
        let labels: Vec<_> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let unit = metric.unit.as_str();
        // A write to a string cannot fail.
        let _ = writeln!(page, "| `{}` | {kind} | {unit} | {} | {} |", metric.name, labels.join(", "), metric.help);
    }
    page.push_str("\n## Bucket bounds of the histograms\n\n| name | bounds |\n|---|---|\n");
    for metric in ALL {
        if let Kind::Histogram(edges) = metric.kind {
            let edges: Vec<_> = edges.iter().map(f64::to_string).collect();
            let _ = writeln!(page, "| `{}` | {} |", metric.name, edges.join(", "));
        }
    }
    page
}
