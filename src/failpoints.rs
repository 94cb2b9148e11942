//! Places where a test can end the program, as a crash would: each step of an
//! event's way has one, and each of a recovery. Without the feature `failpoints` there are none.
//!
//! The variable `FAILPOINTS` says where, and at which passage: `sent=9*off->panic`
//! is the tenth event that was handed to the producer. See the crate `fail`.

/// A place where the program can be ended.
#[cfg(feature = "relay")]
macro_rules! failpoint {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        fail::fail_point!($name);
    };
}

/// Arms the failpoints that `FAILPOINTS` names, until the process ends. One that
/// panics aborts the process: nothing is unwound, drained or flushed.
#[cfg(feature = "failpoints")]
pub fn arm() {
    if std::env::var_os("FAILPOINTS").is_none() {
        return;
    }
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("{panic}");
        std::process::abort();
    }));
    // They stay armed while the scenario lives.
    std::mem::forget(fail::FailScenario::setup());
}
