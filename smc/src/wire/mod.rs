//! Bytes only: no I/O, no clock, no unsafe, never panics.

pub mod clc;
mod fields;
pub mod smcr;
