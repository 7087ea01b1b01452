//! `cpubond bench`: what can be counted exactly without a performance monitoring unit.

pub mod profile;
