//! HTTP/2 exchanges inside their streams.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    meshwork_fuzz::fuzz::message(bytes);
});
