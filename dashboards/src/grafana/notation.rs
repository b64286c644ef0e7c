//! Short notation in panel definitions, and its expansion for Grafana.

/// Expands the short notation in an expression: `@hsm` becomes the matchers of job, instance and member, `@` those of
/// job and instance, and `[~]` the interval that Grafana chooses for rates.
pub(super) fn selected(expression: &str) -> String {
    const TARGET: &str = r#"job=~"$job", instance=~"$instance""#;
    expression
        .replace("@hsm", &format!(r#"{TARGET}, hsm=~"$hsm""#))
        .replace('@', TARGET)
        .replace("[~]", "[$__rate_interval]")
}

/// An id that depends only on the title. It stays the same when other panels are added or removed.
pub(super) fn id_of(title: &str) -> u32 {
    // FNV-1a, reduced to a number that is easy to read.
    title.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)) % 1_000_000 + 1
}
