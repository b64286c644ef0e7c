//! The architecture is plain from the files: imports run downwards, without a circle.

use std::path::Path;

use claviger_tests::imports::Imports;

#[test]
fn no_crate_imports_in_circles() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"));
    for sources in ["daemon/hsm/src", "loadgen/src"] {
        let circles = Imports::of_crate(&root.join(sources)).circles();
        let told: Vec<_> = circles.iter().map(ToString::to_string).collect();
        assert!(circles.is_empty(), "{sources}: {}", told.join("\n"));
    }
}
