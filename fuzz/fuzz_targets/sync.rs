//! Messages of a Sync session, of both sides, and what is kept of them.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    meshwork_fuzz::fuzz::sync(bytes);
});
