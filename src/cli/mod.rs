//! The command line.

pub mod chart;
pub mod printer;
