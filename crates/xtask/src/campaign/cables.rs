//! The dedicated link of a campaign: two cables, of which the second goes through this process.

use std::time::Duration;

use testkit::net::{Shape, Toward};
use testkit::site::Site;

use super::Chance;
use crate::Error;

/// Both directions.
pub const BOTH_WAYS: [Toward; 2] = [Toward::First, Toward::Second];

/// The second cable carries nothing these ways.
pub fn silence(site: &Site, ways: &[Toward]) {
    for cable in &site.lab.user_links {
        ways.iter().for_each(|way| cable.set(*way, Shape::silent()));
    }
}

/// Both cables carry nothing.
///
/// # Errors
/// The kernel's.
pub fn cut(site: &Site) -> Result<(), Error> {
    silence(site, &BOTH_WAYS);
    Ok(site.lab.links[0].silence_both()?)
}

/// One of the two cables, by chance, carries nothing these ways.
///
/// # Errors
/// The kernel's.
pub fn one_silent(site: &Site, ways: &[Toward], chance: &mut Chance) -> Result<(), Error> {
    if chance.below(2) == 0 {
        silence(site, ways);
        return Ok(());
    }
    for way in ways {
        site.lab.links[0].silence(*way)?;
    }
    Ok(())
}

/// Everything goes by the second cable, so much later, and out of order with `jitter`.
///
/// # Errors
/// The kernel's.
pub fn late(site: &Site, delay: Duration, jitter: Duration) -> Result<(), Error> {
    for cable in &site.lab.user_links {
        for way in BOTH_WAYS {
            cable.set(way, Shape::late(delay, jitter));
        }
    }
    Ok(site.lab.links[0].unplug()?)
}

/// Both cables are as they were.
///
/// # Errors
/// The kernel's.
pub fn mend(site: &Site) -> Result<(), Error> {
    for cable in &site.lab.user_links {
        for way in BOTH_WAYS {
            cable.set(way, Shape::default());
        }
    }
    Ok(site.lab.links[0].mend()?)
}
