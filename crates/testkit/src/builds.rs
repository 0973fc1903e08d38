//! Other builds of the product, for what crosses builds in an upgrade.
//!
//! A real earlier build is the best evidence there is: `AX_PREVIOUS_DIR` names a folder with one. Without
//! it this source is built once more with the feature `wire-any`, which lets the environment choose the
//! wire version: what that build says and understands is what the version has, though its other code is
//! today's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use ax_wire::WIRE_VERSION;

use crate::product::{Product, build, profile_dir};
use crate::{Error, Result};

/// Names a folder with the programs of a real build of the wire version before.
const PREVIOUS_VAR: &str = "AX_PREVIOUS_DIR";
/// Read by builds with `wire-any`.
const VERSION_VAR: &str = "AX_WIRE_VERSION";

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
    /// The wire version.
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
            (Build::Ours, _) => Product::get(),
            (Build::Previous, Some(dir)) => {
                static REAL: OnceLock<std::result::Result<Product, String>> = OnceLock::new();
                once(&REAL, || Product::within(Path::new(&dir)))
            }
            (Build::Previous | Build::Next, _) => {
                static ANY: OnceLock<std::result::Result<Product, String>> = OnceLock::new();
                once(&ANY, any)
            }
        }
    }

    /// What has to be in the environment of its programs.
    pub fn variable(self) -> Option<(&'static str, String)> {
        (self != Build::Ours).then(|| (VERSION_VAR, self.wire().to_string()))
    }
}

fn once(
    place: &'static OnceLock<std::result::Result<Product, String>>,
    find: impl FnOnce() -> Result<Product>,
) -> Result<&'static Product> {
    place
        .get_or_init(|| find().map_err(|e| e.to_string()))
        .as_ref()
        .map_err(|e| Error::Product(e.clone()))
}

/// This source with `wire-any`, beside the ordinary build.
fn any() -> Result<Product> {
    let own = profile_dir()?;
    let profile = own.file_name().unwrap_or("debug".as_ref());
    let dir = own.with_file_name("wire-any").join(profile);
    seed(&own, &dir)?;
    let features = ["--features", "ax-daemon/wire-any,ax-vmm/wire-any"];
    // It is built while tests wait: nobody debugs it, and its daemons have time.
    let faster = [
        "profile.dev.debug=false",
        "profile.dev.package.ax-arbiter.opt-level=0",
        "profile.dev.package.ax-daemon.opt-level=0",
    ];
    let faster = faster.iter().flat_map(|set| ["--config", set]);
    let more: Vec<&str> = features.into_iter().chain(faster).collect();
    build(&dir, &["ax-daemon", "ax-vmm"], &more)?;
    Ok(Product {
        axd: dir.join("axd"),
        ax_vmm: dir.join("ax-vmm"),
        // It says nothing between machines.
        axvm: Product::get()?.axvm.clone(),
    })
}

/// Lets a new target folder begin with the libraries that the other one has: those of other people, which
/// know no `wire-any`, are then not compiled again. Without it the build only takes longer.
fn seed(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        return Ok(());
    }
    let failed = |path: &Path| Error::os(format!("fill the target folder {}", path.display()));
    let deps = to.join("deps");
    fs::create_dir_all(&deps).map_err(failed(&deps))?;
    for entry in fs::read_dir(from.join("deps")).map_err(failed(from))? {
        let file: PathBuf = entry.map_err(failed(from))?.path();
        let library = file
            .extension()
            .is_some_and(|e| e == "rlib" || e == "rmeta" || e == "so" || e == "d");
        if let (true, Some(name)) = (library, file.file_name()) {
            // The compiler puts a new file in an old one's place: both folders keep what they have.
            fs::hard_link(&file, deps.join(name)).map_err(failed(&file))?;
        }
    }
    for part in [".fingerprint", "build"] {
        let mut copy = Command::new("cp");
        copy.arg("-a").arg(from.join(part)).arg(to);
        let copied = copy.stdin(Stdio::null()).status().map_err(failed(to))?;
        if !copied.success() {
            return Err(Error::Product(format!("cp -a of {part}: {copied}")));
        }
    }
    Ok(())
}
