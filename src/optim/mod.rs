//! Optimizer rules, routing, schedules and clipping.
