//! Atomic, hashed, resumable checkpoints.
