//! Where tests find real texts.

use std::path::PathBuf;

/// `name` inside the folder `$OSPREY_CORPORA` (or `../shared/corpora` beside the repository); says so and gives nothing where it is
/// absent, so that the tests of a bare checkout still pass.
pub(crate) fn corpora(name: &str) -> Option<PathBuf> {
    let beside = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/corpora");
    let folder = std::env::var_os("OSPREY_CORPORA").map_or_else(beside, PathBuf::from).join(name);
    if !folder.exists() {
        eprintln!("skipped: {} is not here (set OSPREY_CORPORA)", folder.display());
        return None;
    }
    Some(folder)
}
