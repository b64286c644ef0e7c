//! Generates `docs/metrics.md`: a table of all metrics, from the daemon's own table.

use std::fmt::Write;

use claviger::observe::metrics::{ALL, Kind, SLO_SECONDS};

/// Generates the page. `regenerate` is the command that makes it.
pub(crate) fn markdown(regenerate: &str) -> String {
    let mut page = format!(
        "# Metrics

<!-- Generated from daemon/src/observe/metrics/table.rs: {regenerate} -->

The metrics address (`server.metrics`) serves these at `/metrics`, in the text format of Prometheus. Dashboards, rules
and alerts for them are in `dashboards/`; [runbook.md](runbook.md) has a section for every alert.

- Labels are bounded: no host, virtual machine or protector is ever one. Who it was is in `audit.jsonl`.
- Counters begin at zero when the daemon starts, with all label values that can be known by then.
- Gauges of members, sessions, queues and certificates are read when the page is asked for.
- A histogram has the series `_bucket` (with the label `le`), `_sum` and `_count`. {SLO_SECONDS} s is an edge of what
  callers wait for, so the share of releases within the service's objective is exact, not interpolated.

| name | type | unit | labels | what it says |
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
    page.push_str("\n## Edges of the histograms\n\n| name | edges |\n|---|---|\n");
    for metric in ALL {
        if let Kind::Histogram(edges) = metric.kind {
            let edges: Vec<_> = edges.iter().map(f64::to_string).collect();
            let _ = writeln!(page, "| `{}` | {} |", metric.name, edges.join(", "));
        }
    }
    page
}
