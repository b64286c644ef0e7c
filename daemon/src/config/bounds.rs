//! Checks the limits of settings, and the rules that their types do not express.

use std::collections::{BTreeMap, BTreeSet};

use super::fault::{Fault, Step, in_hsm, setting};
use super::hsm::Hsm;
use super::pin::PinSource;
use super::schema::Config;

/// Checks what the types do not: limits of numbers, names, and rules across several sections.
pub(super) fn check(config: &Config) -> Result<(), Fault> {
    let server = &config.server;
    let in_server = |key| setting("server", key);
    within(in_server("max_connections"), server.max_connections as u64, 1, 1_000_000)?;
    let per_address = server.max_connections_per_address as u64;
    within(in_server("max_connections_per_address"), per_address, 0, 1_000_000)?;
    within(in_server("body_rate"), server.body_rate, 0, 1_000_000_000)?;
    within(in_server("body_memory_mib"), server.body_memory_mib, 64, 1_048_576)?;
    within(in_server("body_memory_per_address_mib"), server.body_memory_per_address_mib, 0, 1_048_576)?;
    within(in_server("header_timeout_ms"), server.header_timeout_ms, 1, 600_000)?;
    within(in_server("body_timeout_ms"), server.body_timeout_ms, 1, 600_000)?;
    within(in_server("idle_timeout_ms"), server.idle_timeout_ms, 1, 3_600_000)?;
    within(in_server("drain_timeout_ms"), server.drain_timeout_ms, 1, 600_000)?;
    if server.listen == server.metrics && server.listen.port() != 0 {
        return Err(Fault::new(
            in_server("metrics"),
            format!("{} is the address of server.listen, too", server.metrics),
            "give one of them another port",
        ));
    }
    within(in_server("stranger_rate"), u64::from(server.stranger_rate), 0, 1_000_000)?;
    within(in_server("stranger_burst"), u64::from(server.stranger_burst), 1, 1_000_000)?;
    within(in_server("document_rate"), u64::from(server.document_rate), 0, 1_000_000)?;
    within(in_server("document_burst"), u64::from(server.document_burst), 1, 1_000_000)?;
    within(in_server("unproven_time_percent"), u64::from(server.unproven_time_percent), 0, 100)?;
    let in_attest = |key| setting("attest", key);
    within(in_attest("host_rate"), u64::from(config.attest.host_rate), 0, 1_000_000)?;
    within(in_attest("host_burst"), u64::from(config.attest.host_burst), 1, 1_000_000)?;
    within(in_attest("concurrency"), config.attest.concurrency as u64, 0, 100_000)?;
    let in_release = |key| setting("release", key);
    within(in_release("refused_rate"), u64::from(config.release.refused_rate), 0, 1_000_000)?;
    within(in_release("refused_burst"), u64::from(config.release.refused_burst), 1, 1_000_000)?;
    within(in_release("deadline_ms"), config.release.deadline_ms, 1, 600_000)?;
    within(in_release("watchdog_ms"), config.release.watchdog_ms, 10, 60_000)?;
    within(in_release("batch"), config.release.batch as u64, 1, 1_024)?;
    within(in_release("queue"), config.release.queue as u64, 1, 1_000_000)?;
    within(in_release("concurrency"), config.release.concurrency as u64, 0, 100_000)?;
    within(in_release("host_rate"), u64::from(config.release.host_rate), 0, 1_000_000)?;
    within(in_release("host_burst"), u64::from(config.release.host_burst), 1, 1_000_000)?;
    within(in_release("max_offline_unwraps"), u64::from(config.release.max_offline_unwraps), 0, 1_000)?;
    within(in_release("stock_mib"), config.release.stock_mib, 0, 65_536)?;
    within(setting("audit", "reserve_mib"), config.audit.reserve_mib, 0, 65_536)?;
    within(setting("audit", "checkpoint_lines"), config.audit.checkpoint_lines, 1, 10_000_000)?;
    within(setting("audit", "checkpoint_seconds"), config.audit.checkpoint_seconds, 0, 86_400)?;
    if let Some(node) = &server.node
        && (!(1..=64).contains(&node.len()) || !node.bytes().all(|byte| byte.is_ascii_graphic()))
    {
        return Err(Fault::new(
            in_server("node"),
            format!("{node:?} is not a name for a machine"),
            "use 1 to 64 printable characters of ASCII without spaces",
        ));
    }
    if config.etcd.is_some() && server.node().contains('/') {
        return Err(Fault::new(
            in_server("node"),
            format!("{:?} has a '/', and names this node in etcd", server.node()),
            "use a name without it",
        ));
    }
    environment(&config.env, &[Step::Key("env".into())])?;
    if config.hsm.is_empty() {
        return Err(Fault::new(
            vec![Step::Key("hsm".into())],
            "there is no HSM".to_owned(),
            "add an [[hsm]] section with name, module, token and pin_file",
        ));
    }
    let mut names = BTreeSet::new();
    for (index, hsm) in config.hsm.iter().enumerate() {
        check_hsm(hsm, index)?;
        if !names.insert(hsm.name.to_ascii_lowercase()) {
            return Err(Fault::new(
                in_hsm(index, "name"),
                format!("{:?} is the name of another HSM, too", hsm.name),
                "give every HSM a name of its own",
            ));
        }
    }
    Ok(())
}

fn check_hsm(hsm: &Hsm, index: usize) -> Result<(), Fault> {
    let at = |key| in_hsm(index, key);
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    if !(1..=64).contains(&hsm.name.len()) || !hsm.name.chars().all(plain) {
        return Err(Fault::new(
            at("name"),
            format!("{:?} is not a name for an HSM", hsm.name),
            "use 1 to 64 letters, digits, '.', '-' or '_'",
        ));
    }
    if let PinSource::Env(name) = &hsm.pin
        && name.contains(['=', '\0'])
    {
        return Err(bad_variable(at("pin_env"), name));
    }
    within(at("weight"), u64::from(hsm.weight), 1, 1_000)?;
    within(at("sessions"), hsm.sessions as u64, 1, 1_024)?;
    environment(&hsm.env, &at("env"))
}

fn within(steps: Vec<Step>, value: u64, least: u64, most: u64) -> Result<(), Fault> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(Fault {
        steps,
        problem: format!("{value} is out of bounds"),
        advice: format!("use a number from {least} to {most}"),
    })
}

fn environment(env: &BTreeMap<String, String>, steps: &[Step]) -> Result<(), Fault> {
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            let mut steps = steps.to_vec();
            steps.push(Step::Key(name.clone().into()));
            return Err(bad_variable(steps, name));
        }
    }
    Ok(())
}

fn bad_variable(steps: Vec<Step>, name: &str) -> Fault {
    Fault::new(
        steps,
        format!("{name:?} cannot be an environment variable"),
        "a name is not empty and has no '='; neither name nor value has a NUL",
    )
}
