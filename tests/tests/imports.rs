//! The architecture is plain from the files: imports run downwards, without a circle.

use std::path::Path;

use claviger_tests::imports::Imports;

#[test]
fn these_crates_do_not_import_in_circles() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"));
    let daemon = ["daemon/protocol/src", "daemon/hsm/src", "daemon/process/src", "daemon/client/src"];
    let others = ["bench/src", "dashboards/src", "loadgen/src", "tests/src"];
    for sources in daemon.into_iter().chain(others) {
        let circles = Imports::of_crate(&root.join(sources)).circles();
        let told: Vec<_> = circles.iter().map(ToString::to_string).collect();
        assert!(circles.is_empty(), "{sources}: {}", told.join("\n"));
    }
}
