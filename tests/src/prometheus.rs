//! A Prometheus server, from Debian's package, that scrapes a daemon.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use claviger_client::http::Client;
use serde_json::Value;

use crate::daemon::Daemon;
use crate::process::Process;
use crate::wait::PATIENCE;

/// A running Prometheus. It is stopped when this is dropped.
pub struct Prometheus {
    process: Process,
    client: Client,
}

impl Prometheus {
    /// Scrapes `daemon` every second as job `claviger`, and evaluates `rules` at the same rate. Keeps its files in
    /// `folder`.
    ///
    /// # Panics
    /// If Prometheus does not start to serve.
    pub async fn watch(daemon: &Daemon, rules: &str, folder: &Path) -> Self {
        let (_, target) = daemon.metrics_url.split_once("://").unwrap();
        let config = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}\n\
             rule_files: [rules.yml]\n\
             scrape_configs:\n  - job_name: claviger\n    static_configs: [{{targets: ['{target}']}}]\n"
        );
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("prometheus.yml"), config).unwrap();
        std::fs::write(folder.join("rules.yml"), rules).unwrap();
        // Prometheus does not report the port it gets for port 0. So a port that is free now is used; if it is taken
        // meanwhile, the next one is tried.
        for _ in 0..5 {
            let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let file = format!("--config.file={}", folder.join("prometheus.yml").display());
            let data = format!("--storage.tsdb.path={}", folder.join("data").display());
            let listen = format!("--web.listen-address={free}");
            let process = Process::start(Command::new("prometheus").args([file, data, listen]));
            let ready = process.line(|line| {
                let failed = line.contains("address already in use");
                (failed || line.contains("Server is ready to receive web requests")).then_some(!failed)
            });
            if ready {
                let client = Client::new(&format!("http://{free}")).unwrap().with_timeout(PATIENCE);
                return Self { process, client };
            }
        }
        panic!("no port is free");
    }

    /// Returns the current value of an expression.
    ///
    /// # Errors
    /// Returns Prometheus's error message.
    ///
    /// # Panics
    /// If Prometheus does not answer.
    pub async fn query(&self, expression: &str) -> Result<Vec<Value>, String> {
        let answer = self.get(&format!("/api/v1/query?query={}", encoded(expression))).await;
        match &answer["data"]["result"] {
            // A scalar is a pair of time and value.
            Value::Array(result) if answer["data"]["resultType"] == "scalar" => Ok(vec![Value::Array(result.clone())]),
            Value::Array(result) => Ok(result.clone()),
            _ => Err(answer["error"].to_string()),
        }
    }

    /// Returns the values of a label in the series of a selector.
    ///
    /// # Panics
    /// If Prometheus does not answer.
    pub async fn label_values(&self, selector: &str, label: &str) -> Vec<String> {
        let answer = self.get(&format!("/api/v1/label/{label}/values?match[]={}", encoded(selector))).await;
        serde_json::from_value(answer["data"].clone()).unwrap_or_default()
    }

    /// Returns every rule with its state.
    ///
    /// # Panics
    /// If Prometheus does not answer.
    pub async fn rules(&self) -> Vec<Value> {
        let answer = self.get("/api/v1/rules").await;
        let groups = answer["data"]["groups"].as_array().unwrap();
        groups.iter().flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
    }

    /// Returns the firing alerts: each alert's name, and the label `hsm` if it has one.
    ///
    /// # Panics
    /// If Prometheus does not answer.
    pub async fn firing(&self) -> BTreeSet<(String, Option<String>)> {
        let answer = self.get("/api/v1/alerts").await;
        let alerts = answer["data"]["alerts"].as_array().unwrap();
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let firing = alerts.iter().filter(|alert| alert["state"] == "firing");
        firing.map(|alert| (text(&alert["labels"]["alertname"]).unwrap(), text(&alert["labels"]["hsm"]))).collect()
    }

    /// Returns the whole output so far.
    #[must_use]
    pub fn output(&self) -> String {
        self.process.output()
    }

    async fn get(&self, path: &str) -> Value {
        let reply = self.client.get(path).await.unwrap();
        serde_json::from_slice(&reply.body).unwrap()
    }
}

/// Encodes text for the query of a URL.
fn encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |mut url, octet| {
        if octet.is_ascii_alphanumeric() {
            url.push(char::from(octet));
        } else {
            write!(url, "%{octet:02X}").unwrap();
        }
        url
    })
}
