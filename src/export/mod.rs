//! Checkpoint to the files other engines load, and back.
