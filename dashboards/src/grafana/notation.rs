//! Short forms in descriptions of panels, and what they stand for in Grafana.

/// The selection of the variables in an expression: `@hsm` stands for the matchers of job, instance and member, `@`
/// for those
/// of job and instance, `[~]` for the interval that Grafana picks for rates.
pub(super) fn selected(expression: &str) -> String {
    const TARGET: &str = r#"job=~"$job", instance=~"$instance""#;
    expression
        .replace("@hsm", &format!(r#"{TARGET}, hsm=~"$hsm""#))
        .replace('@', TARGET)
        .replace("[~]", "[$__rate_interval]")
}

/// An id that stays when panels come and go around it.
pub(super) fn id_of(title: &str) -> u32 {
    // FNV-1a, and small enough to be read.
    title.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)) % 1_000_000 + 1
}
