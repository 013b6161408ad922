//! Packets at the agent's port for names.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    meshwork_fuzz::fuzz::names::dns(bytes);
});
