//! Reads the counts of the last run from gungraun's files.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// Number of releases that `bench/instructions` counts together in the part [`TOGETHER`]; their mean is reported.
const RELEASES: u64 = 10;
/// See [`RELEASES`].
const TOGETHER: &str = "whole/next/usual";

/// Instructions, by part: `group/function/case`.
pub type Counts = BTreeMap<String, u64>;

/// Why the counts cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CountError {
    /// A file or folder cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// A file is not a summary of gungraun.
    #[error("{}: no summary of gungraun: {what}", path.display())]
    Summary {
        /// The file.
        path: PathBuf,
        /// The problem.
        what: String,
    },
    /// There are no counts.
    #[error("nothing was counted in {}; count first: make bench-instructions", .0.display())]
    Nothing(PathBuf),
}

/// The counts of all summaries in a folder and the folders in it.
///
/// # Errors
/// See [`CountError`].
pub fn read(folder: &Path) -> Result<Counts, CountError> {
    let mut counts = Counts::new();
    collect(folder, &mut counts)?;
    if counts.is_empty() {
        return Err(CountError::Nothing(folder.to_owned()));
    }
    Ok(counts)
}

fn collect(folder: &Path, counts: &mut Counts) -> Result<(), CountError> {
    let error = |path: &Path, source| CountError::Read { path: path.to_owned(), source };
    let entries = match std::fs::read_dir(folder) {
        Err(failure) if failure.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(|failure| error(folder, failure))?,
    };
    for entry in entries {
        let path = entry.map_err(|failure| error(folder, failure))?.path();
        if path.is_dir() {
            collect(&path, counts)?;
        } else if path.file_name().is_some_and(|name| name == "summary.json") {
            let text = std::fs::read(&path).map_err(|failure| error(&path, failure))?;
            let (part, count) = summary(&text).map_err(|what| CountError::Summary { path, what })?;
            counts.insert(part, count);
        }
    }
    Ok(())
}

fn summary(text: &[u8]) -> Result<(String, u64), String> {
    let summary: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let field = |name: &str| summary[name].as_str().ok_or_else(|| format!("no {name}"));
    // bench::group::function
    let module = field("module_path")?;
    let (_, part) = module.split_once("::").ok_or_else(|| format!("no group in {module}"))?;
    let part = format!("{}/{}", part.replace("::", "/"), field("id")?);
    let profiles = summary["profiles"].as_array().map_or(&[][..], Vec::as_slice);
    let callgrind = profiles.iter().find(|profile| profile["tool"] == "Callgrind");
    let count = callgrind.and_then(|profile| profile.pointer("/data/total/metrics/Ir/values/new")?.as_u64());
    let count = count.ok_or("no count of instructions by callgrind")?;
    let count = if part == TOGETHER { count / RELEASES } else { count };
    Ok((part, count))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn summary_of(function: &str, count: &str) -> String {
        format!(
            r#"{{"id": "usual", "module_path": "release::whole::{function}", "profiles": [{{"tool": "Callgrind", "data": {{
            "total": {{"metrics": {{"Ir": {{"values": {{"new": {count}, "old": 7}}}}}}}}}}}}]}}"#
        )
    }

    #[test]
    fn counts_are_found_in_the_summaries_of_all_folders() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(read(folder.path()), Err(CountError::Nothing(_))));
        assert!(matches!(read(&folder.path().join("missing")), Err(CountError::Nothing(_))));
        for (function, count) in [("first", 900), ("next", 4000)] {
            let part = folder.path().join("whole").join(function);
            std::fs::create_dir_all(&part).unwrap();
            std::fs::write(part.join("summary.json"), summary_of(function, &count.to_string())).unwrap();
            std::fs::write(part.join("callgrind.log"), "not read").unwrap();
        }
        let counts = read(folder.path()).unwrap();
        assert_eq!(counts, [("whole/first/usual".to_owned(), 900), ("whole/next/usual".to_owned(), 400)].into());
    }

    #[test]
    fn a_summary_without_a_count_is_an_error_that_names_its_file() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("summary.json"), summary_of("first", "null")).unwrap();
        let error = read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("summary.json") && error.contains("no count"), "{error}");
    }
}
