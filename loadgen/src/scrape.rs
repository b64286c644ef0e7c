//! Reads the part of a daemon's `/metrics` page that shows what limits the daemon.

use crate::Failure;
use crate::http::Client;

/// A sample of the metrics. A field is `None` if the daemon does not report it.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Look {
    /// Processor time that the daemon has used so far, in seconds.
    pub cpu_seconds: Option<f64>,
    /// Number of HSM operations so far.
    pub hsm_calls: Option<f64>,
    /// Processor time in calls of the HSM modules so far, in seconds.
    pub hsm_cpu_seconds: Option<f64>,
    /// Number of releases in the admission queue.
    pub waiting: Option<f64>,
    /// Number of members of the cluster.
    pub hsms: Option<usize>,
    /// Version and commit of the daemon.
    pub version: Option<String>,
}

impl Look {
    /// Parses a page in the Prometheus text format.
    #[must_use]
    pub fn parse(page: &str) -> Self {
        let series = || page.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' '));
        let values = |wanted: &str| -> Vec<f64> {
            let named = series().filter(|(series, _)| series.split('{').next() == Some(wanted));
            named.filter_map(|(_, value)| value.parse().ok()).collect()
        };
        let sum =
            |wanted: &str| Some(values(wanted)).filter(|values| !values.is_empty()).map(|values| values.iter().sum());
        let build = series().find(|(series, _)| series.starts_with("claviger_build_info{"));
        let label = |name: &str| {
            let (_, rest) = build?.0.split_once(&format!("{name}=\""))?;
            Some(rest.split_once('"')?.0).filter(|value| !value.is_empty())
        };
        let commit = label("commit").map_or(String::new(), |commit| format!(" ({commit})"));
        Self {
            version: label("version").map(|version| format!("claviger {version}{commit}")),
            // The worker processes of the HSMs are part of the daemon.
            cpu_seconds: sum("process_cpu_seconds_total")
                .map(|daemon| daemon + sum("claviger_hsm_worker_cpu_seconds_total").unwrap_or(0.0)),
            hsm_calls: sum("claviger_hsm_calls_total"),
            hsm_cpu_seconds: sum("claviger_hsm_cpu_seconds_total"),
            waiting: sum("claviger_queue_waiting"),
            hsms: Some(values("claviger_hsm_sessions_open").len()).filter(|count| *count > 0),
        }
    }

    /// Requests the metrics page of the daemon.
    ///
    /// # Errors
    /// There is no such page.
    pub async fn take(client: &Client) -> Result<Self, Failure> {
        let reply = client.get("/metrics").await?;
        if reply.status != 200 {
            return Err(format!(
                "/metrics answers {}; is --metrics the daemon's metrics address?",
                reply.status.as_u16()
            )
            .into());
        }
        Ok(Self::parse(&String::from_utf8_lossy(&reply.body)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_read_and_the_rest_is_unknown() {
        let page = "# HELP claviger_hsm_calls_total x\nclaviger_hsm_calls_total{hsm=\"a\",op=\"sign\",rv=\"ok\"} 3\n\
                    claviger_hsm_calls_total{hsm=\"b\",op=\"sign\",rv=\"ok\"} 4\nclaviger_hsm_sessions_open{hsm=\"a\"} 8\n\
                    claviger_hsm_sessions_open{hsm=\"b\"} 8\nprocess_cpu_seconds_total 1.5\n\
                    claviger_build_info{version=\"1.2.3\",commit=\"abc\"} 1\n";
        let look = Look::parse(page);
        let version = Some("claviger 1.2.3 (abc)".to_owned());
        let told = Look { cpu_seconds: Some(1.5), hsm_calls: Some(7.0), hsms: Some(2), version, ..Look::default() };
        assert_eq!(look, told);
        let look = Look::parse("claviger_build_info{version=\"1.2.3\",commit=\"\"} 1\n");
        assert_eq!(look.version.as_deref(), Some("claviger 1.2.3"));
        assert_eq!(Look::parse(""), Look::default());
    }
}
