//! The daemon's stock of ready-made egress protectors: its setting and its metrics.

use std::path::Path;

use claviger::config::Config;
use claviger_tests::Lab;
use toml::{Table, Value};

/// Whether a metric belongs to the stock.
#[must_use]
pub fn is_stock(series: &str) -> bool {
    series.starts_with("claviger_stock_")
}

/// Sets the memory of the stock. Returns `false` if the daemon does not have this setting; the configuration is then
/// unchanged.
///
/// # Panics
/// The lab's configuration cannot be read or written.
pub fn set_stock(lab: &Lab, mib: u64) -> bool {
    let file = lab.config_file();
    let before = std::fs::read_to_string(&file).unwrap();
    let mut config: Table = before.parse().unwrap();
    let release = config.entry("release").or_insert_with(|| Value::Table(Table::new()));
    release.as_table_mut().unwrap().insert("stock_mib".to_owned(), Value::Integer(i64::try_from(mib).unwrap()));
    write(&file, &config.to_string());
    let known = Config::load(&file).is_ok();
    if !known {
        write(&file, &before);
    }
    known
}

fn write(file: &Path, text: &str) {
    std::fs::write(file, text).unwrap();
}
