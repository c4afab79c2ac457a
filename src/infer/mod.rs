//! The CPU engine over exported files.
