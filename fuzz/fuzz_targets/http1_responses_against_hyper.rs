//! What two agents pass of an app's bytes, and what hyper reads of it.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    meshwork_fuzz::fuzz::responses_against_hyper(bytes);
});
