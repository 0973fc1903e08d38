//! Builds of the product that speak other wire versions, for what crosses builds in an upgrade.
//!
//! A real earlier build is the best evidence there is: `AX_PREVIOUS_DIR` names a folder with one. Without
//! it these are this source's own programs, which take the wire version from their environment (none built
//! for use does): what they say and understand is what the version has, though their other code is today's.

use std::path::Path;
use std::sync::OnceLock;

use ax_wire::WIRE_VERSION;

use crate::product::Product;
use crate::{Error, Result};

/// Names a folder with the programs of a real build of the wire version before.
const PREVIOUS_VAR: &str = "AX_PREVIOUS_DIR";
/// Read by the product where it is built with debug assertions.
const VERSION_VAR: &str = "AX_WIRE_VERSION";

/// Whether the product takes its wire version from the environment.
pub const BUILT_IN: bool = cfg!(debug_assertions);

/// A build of the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Build {
    /// This source's.
    Ours,
    /// One whose newest wire version is the one before this source's.
    Previous,
    /// One whose newest wire version is the one after this source's.
    Next,
}

impl Build {
    /// The newest wire version it speaks.
    pub fn wire(self) -> u16 {
        let ours = WIRE_VERSION.number();
        match self {
            Build::Ours => ours,
            Build::Previous => ours - 1,
            Build::Next => ours + 1,
        }
    }

    /// Its programs, built first if need be.
    ///
    /// # Errors
    /// What cargo said, or the program that is missing.
    pub fn product(self) -> Result<&'static Product> {
        match (self, std::env::var_os(PREVIOUS_VAR)) {
            (Build::Previous, Some(dir)) => {
                static REAL: OnceLock<std::result::Result<Product, String>> = OnceLock::new();
                REAL.get_or_init(|| Product::within(Path::new(&dir)).map_err(|e| e.to_string()))
                    .as_ref()
                    .map_err(|e| Error::Product(e.clone()))
            }
            _ => Product::get(),
        }
    }

    /// What has to be in the environment of its programs.
    pub fn variable(self) -> Option<(&'static str, String)> {
        (self != Build::Ours).then(|| (VERSION_VAR, self.wire().to_string()))
    }
}

/// Returns from the calling test, listed as skipped, when the product always speaks its own wire version.
#[macro_export]
macro_rules! require_builds {
    () => {
        if !$crate::builds::BUILT_IN {
            let why = "this build speaks one wire version: build with debug assertions";
            $crate::skip::report("no other build", why, &$crate::skip::test_name());
            return;
        }
    };
}
