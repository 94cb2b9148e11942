#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| postbox_fuzz::bounded(postbox::properties::event, input));
