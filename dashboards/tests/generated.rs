//! The committed files are equal to the generated ones.

#![allow(clippy::unwrap_used)]

use claviger_dashboards::{REGENERATE, files, root};

#[test]
fn committed_files_are_up_to_date() {
    for file in files() {
        let committed = std::fs::read_to_string(root().join(file.path)).unwrap_or_default();
        assert!(committed == file.text, "{} is out of date: {REGENERATE}", file.path);
    }
}
