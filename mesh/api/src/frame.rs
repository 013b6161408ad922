//! Frames: to be written.
