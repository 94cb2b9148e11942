//! The `postbox` program: see `postbox help`.

mod cli;

use std::io::Write;

fn main() {
    let code = cli::main();
    // An error here has nobody left to hear of it.
    let _ = std::io::stdout().flush();
    // At an ordinary exit OpenSSL tears itself down while librdkafka's threads may be
    // in the middle of a handshake, and they crash: 4 of 160 relays that ended over a
    // wrong password did. All that must be durable is so already.
    signal_hook::low_level::exit(i32::from(code));
}
