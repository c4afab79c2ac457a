//! Storage formats for weights.
