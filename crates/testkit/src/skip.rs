//! Skipped tests are told by name.
//!
//! libtest knows only passed, failed and ignored, and decides before the test runs; a test that
//! finds out by itself that it cannot run here would count as passed. So it writes one line to
//! the real standard error (libtest captures only what goes through the print macros) and, when
//! [`LOG_VAR`] names a file, one line into it, from which `cargo xtask test` makes its summary.

use std::fs::OpenOptions;
use std::io::Write;

/// Environment variable naming the file skipped tests are appended to.
pub const LOG_VAR: &str = "AX_SKIPPED_TESTS";

/// The line for one skipped test.
pub fn line(what: &str, why: &str, test: &str) -> String {
    format!("SKIPPED ({what}: {}): {test}", why.replace('\n', " "))
}

/// Tells that `test` did not run because `what` is missing here, for the reason `why`.
pub fn report(what: &str, why: &str, test: &str) {
    let text = line(what, why, test);
    // Nowhere better to complain if standard error itself is gone.
    let _ = writeln!(std::io::stderr(), "{text}");
    if let Some(path) = std::env::var_os(LOG_VAR) {
        let wrote = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            // One write call: O_APPEND keeps lines of parallel tests whole.
            .and_then(|mut f| f.write_all(format!("{text}\n").as_bytes()));
        if let Err(e) = wrote {
            let _ = writeln!(
                std::io::stderr(),
                "cannot note the skipped test in {path:?}: {e}"
            );
        }
    }
}

/// The running test's full name: libtest names each test's thread after it.
pub fn test_name() -> String {
    std::thread::current()
        .name()
        .unwrap_or("(unnamed test)")
        .to_string()
}

/// Whether a program is found where programs are.
pub fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Returns from the calling test, listed as skipped, when a client it needs is not installed.
#[macro_export]
macro_rules! require_program {
    ($program:expr, $package:expr) => {
        if !$crate::skip::is_installed($program) {
            let (what, why) = (
                concat!("no ", $program),
                concat!("install Debian's ", $package),
            );
            $crate::skip::report(what, why, &$crate::skip::test_name());
            return;
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_by_its_name_alone() {
        assert!(is_installed("sh"));
        assert!(!is_installed("no-such-program-of-ax"));
        assert!(!is_installed("."));
    }

    #[test]
    fn a_skipped_test_is_told_by_name_on_one_line() {
        assert_eq!(
            test_name(),
            "skip::tests::a_skipped_test_is_told_by_name_on_one_line"
        );
        assert_eq!(
            line("no usable KVM", "no\ndevice", "x::y"),
            "SKIPPED (no usable KVM: no device): x::y"
        );
    }
}
