//! Fail points: named moments of the product's life at which a test has the process die, wait or fail.
//!
//! What goes wrong between two steps of an epoch can't be met from outside by luck. So the code says
//! where it is ([`reached`], [`fails`]), and a test says, in a file, what is to happen there. Whether
//! the file is looked for at all is decided twice: when the program is built (only with debug
//! assertions, as tests are; in a release build every function here is empty), and when it starts
//! ([`VAR`] must name the file). A program that listens says so in its log.
//!
//! The file has one [`Order`] a line, such as `shipped skip=17 kill`. It is read again whenever it
//! changes, and counting begins anew then; an empty file disarms everything.

mod order;
#[cfg(debug_assertions)]
mod registry;

pub use order::{Action, BadOrder, Order, Point};

/// The environment variable that names the file with orders.
pub const VAR: &str = "AX_FAIL_POINTS";

/// True when this build has fail points.
pub const BUILT_IN: bool = cfg!(debug_assertions);

/// Begins to look for orders, if the environment asks for it.
pub fn listen() {
    let Some(file) = std::env::var_os(VAR) else {
        return;
    };
    #[cfg(debug_assertions)]
    registry::listen(file.into());
    #[cfg(not(debug_assertions))]
    tracing::warn!(?file, "{VAR} is ignored: this build has no fail points");
}

/// Arms fail points of this process, in place of those before. For tests that run the code themselves.
#[cfg(debug_assertions)]
pub fn arm(orders: &[Order]) {
    registry::arm(orders);
}

/// The process is here: it dies or waits if a test has asked for that.
#[inline]
pub fn reached(point: Point) {
    #[cfg(debug_assertions)]
    if registry::due(point) {
        tracing::error!(%point, "nothing can fail here: the order is ignored");
    }
    #[cfg(not(debug_assertions))]
    let _ = point;
}

/// As [`reached`]; true when what is done here is to fail, in the way the caller's documentation says.
#[inline]
#[must_use]
pub fn fails(point: Point) -> bool {
    #[cfg(debug_assertions)]
    return registry::due(point);
    #[cfg(not(debug_assertions))]
    {
        let _ = point;
        false
    }
}
