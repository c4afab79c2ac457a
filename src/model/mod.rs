//! The decoder family: one forward pass, faces chosen by independent keys.

pub mod adapt;
mod config;
mod decoder;
pub mod flops;
pub mod init;
mod params;
mod rope;
mod spec;
pub mod statistics;

pub use config::{Config, Face};
pub use decoder::{Decoder, Inputs, Observer, Site};
pub use params::{GradientBuffers, Parameter, Parameters, Role, Weight};
pub use rope::RopeScaling;
pub use spec::{Activation, LinearKind, Norm, Spec};
