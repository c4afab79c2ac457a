//! Typed recipes.
