//! What an export lost.
