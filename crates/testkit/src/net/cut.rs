//! Cables, and the ways they fail.

use super::{NetNs, netlink};
use crate::Result;

/// A direction on a [`Cable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Toward {
    /// Frames on their way to the first end.
    First,
    /// Frames on their way to the second end.
    Second,
}

/// A cable between two network namespaces.
///
/// Changes have taken effect when the call returns. [`Cable::unplug`] and
/// [`Cable::silence`] are independent of each other; [`Cable::mend`] undoes both.
#[derive(Debug, Clone)]
pub struct Cable {
    first: (NetNs, String),
    second: (NetNs, String),
}

impl Cable {
    /// Lays a cable; both ends are still down.
    pub(super) fn lay(a: &NetNs, dev_a: &str, b: &NetNs, dev_b: &str) -> Result<Cable> {
        netlink::add_veth(a, dev_a, b, dev_b)?;
        Ok(Cable {
            first: (a.clone(), dev_a.into()),
            second: (b.clone(), dev_b.into()),
        })
    }

    /// Pulls the plug at the second end: both lose their carrier and see it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unplug(&self) -> Result<()> {
        netlink::set_up(&self.second.0, &self.second.1, false)
    }

    /// Undoes [`Cable::unplug`].
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn plug_in(&self) -> Result<()> {
        netlink::set_up(&self.second.0, &self.second.1, true)
    }

    /// From now on every frame in this direction vanishes; neither end sees its carrier go,
    /// as when a switch between them dies.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn silence(&self, direction: Toward) -> Result<()> {
        let (ns, dev) = self.sender(direction);
        netlink::set_silent(ns, dev, true)
    }

    /// [`Cable::silence`] in both directions.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn silence_both(&self) -> Result<()> {
        self.silence(Toward::First)?;
        self.silence(Toward::Second)
    }

    /// Undoes [`Cable::silence`] in this direction; it must have been silenced.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unsilence(&self, direction: Toward) -> Result<()> {
        let (ns, dev) = self.sender(direction);
        netlink::set_silent(ns, dev, false)
    }

    /// Makes the cable whole again, whatever was done to it.
    ///
    /// # Errors
    /// When the kernel refuses to bring it up.
    pub fn mend(&self) -> Result<()> {
        for direction in [Toward::First, Toward::Second] {
            // Fails when this direction was not silent, which is what is wanted.
            if let Err(e) = self.unsilence(direction) {
                tracing::trace!("mend: {e}");
            }
        }
        netlink::set_up(&self.first.0, &self.first.1, true)?;
        self.plug_in()
    }

    fn sender(&self, direction: Toward) -> (&NetNs, &str) {
        let (ns, dev) = match direction {
            Toward::Second => &self.first,
            Toward::First => &self.second,
        };
        (ns, dev)
    }
}
