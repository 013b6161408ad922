//! The targets' bodies are the tests' own, without what the tests need besides them: that would take minutes to build.

#[path = "../../tests/src/fuzz.rs"]
pub mod fuzz;
