//! TLS records after the handshake.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    meshwork_fuzz::fuzz::tls_records(bytes);
});
