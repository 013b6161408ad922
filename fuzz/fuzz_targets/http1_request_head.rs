//! Heads of HTTP/1 requests.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    meshwork_fuzz::fuzz::http1_request_head(bytes);
});
