//! Conversions: to be written.
