//! The decoder family.

mod spec;

pub use spec::{Activation, LinearKind, Norm, Spec};
