//! Files of services.d.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    meshwork_fuzz::fuzz::workload_file(bytes);
});
