//! What two agents pass of a caller's bytes, and what hyper reads of it.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    meshwork_fuzz::fuzz::requests_against_hyper(bytes);
});
