//! Heads of HTTP/1 responses.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    meshwork_fuzz::fuzz::http1_response_head(bytes);
});
