//! The standard laboratory: see the picture in [the module's story](super).

use std::net::Ipv4Addr;
use std::time::Duration;

use super::{Cable, FrameCable, Host, NetNs, netlink};
use crate::Result;

/// Addresses of the business network (/24) and the dedicated links (/30).
pub mod addr {
    use super::Ipv4Addr;

    /// Prefix length of the business network.
    pub const LAN_PREFIX: u8 = 24;
    /// Host a.
    pub const A: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
    /// Host b.
    pub const B: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
    /// The witness.
    pub const WITNESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 3);
    /// The client.
    pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 4);
    /// Prefix length of a dedicated link.
    pub const LINK_PREFIX: u8 = 30;

    /// Host a's end of dedicated link `n`, on its interface `link<n>`.
    pub const fn link_a(n: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 99, n, 1)
    }

    /// Host b's end of dedicated link `n`, on its interface `link<n>`.
    pub const fn link_b(n: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 99, n, 2)
    }
}

/// The guest's address on the business network, by convention.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 10);

/// What a [`Lab`] is to have.
#[derive(Debug, Clone, Copy)]
pub struct LabSpec {
    /// Taps `axtap0`, `axtap1` … in `br0` of hosts a and b.
    pub taps: u8,
    /// Dedicated links `link0`, `link1` … between a and b.
    pub links: u8,
    /// More of them, numbered on, whose frames go through this process.
    pub user_links: u8,
    /// How far the monotonic and boot-time clocks of a, b, witness and client run ahead of the
    /// machine's.
    pub clocks_ahead: [Duration; 4],
}

impl Default for LabSpec {
    /// One tap, one link, four clocks far apart.
    fn default() -> Self {
        let days = |d: u64| Duration::from_secs(d * 86_400 + 1_234);
        LabSpec {
            taps: 1,
            links: 1,
            user_links: 0,
            clocks_ahead: [days(3), days(90), days(1), Duration::ZERO],
        }
    }
}

/// Two hosts, a witness and a client, and the networks between them. Dropping it takes
/// everything away, running processes included.
#[derive(Debug)]
pub struct Lab {
    /// First host of the pair.
    pub a: Host,
    /// Second host of the pair.
    pub b: Host,
    /// Where `axd witness` runs.
    pub witness: Host,
    /// Where the oracles stand.
    pub client: Host,
    /// Cables from each host (first end) to the business network's switch (second end).
    pub uplinks: Uplinks,
    /// Dedicated links from a (first end) to b (second end).
    pub links: Vec<Cable>,
    /// Those whose frames go through this process, in the order of their numbers.
    pub user_links: Vec<FrameCable>,
}

/// The cables into the business network, by host.
#[derive(Debug)]
pub struct Uplinks {
    /// Of host a.
    pub a: Cable,
    /// Of host b.
    pub b: Cable,
    /// Of the witness.
    pub witness: Cable,
    /// Of the client.
    pub client: Cable,
}

impl Lab {
    /// Builds the laboratory.
    ///
    /// # Errors
    /// [`crate::Error::NoNamespaces`] when this user may not; otherwise what the kernel refused.
    pub fn new(spec: LabSpec) -> Result<Lab> {
        let lan = NetNs::new("lan")?;
        netlink::add_bridge(&lan, "lan")?;
        let [ahead_a, ahead_b, ahead_witness, ahead_client] = spec.clocks_ahead;
        let a = Host::new("a", ahead_a)?;
        let b = Host::new("b", ahead_b)?;
        let witness = Host::new("witness", ahead_witness)?;
        let client = Host::new("client", ahead_client)?;

        let uplink = |host: &Host| -> Result<Cable> {
            let cable = Cable::lay(host.net(), "uplink", &lan, host.name())?;
            netlink::attach(&lan, host.name(), "lan")?;
            Ok(cable)
        };
        let uplinks = Uplinks {
            a: uplink(&a)?,
            b: uplink(&b)?,
            witness: uplink(&witness)?,
            client: uplink(&client)?,
        };
        for (host, ip) in [(&a, addr::A), (&b, addr::B)] {
            let net = host.net();
            netlink::add_bridge(net, "br0")?;
            netlink::attach(net, "uplink", "br0")?;
            netlink::add_address(net, "br0", ip, addr::LAN_PREFIX)?;
            for n in 0..spec.taps {
                let tap = format!("axtap{n}");
                netlink::add_tap(net, &tap)?;
                netlink::attach(net, &tap, "br0")?;
            }
        }
        for (host, ip) in [(&witness, addr::WITNESS), (&client, addr::CLIENT)] {
            netlink::add_address(host.net(), "uplink", ip, addr::LAN_PREFIX)?;
            netlink::set_up(host.net(), "uplink", true)?;
        }
        let links = (0..spec.links)
            .map(|n| dedicated(&a, &b, n))
            .collect::<Result<_>>()?;
        let user_links = spec.links..spec.links.saturating_add(spec.user_links);
        let user_links = user_links
            .map(|n| FrameCable::lay(&a, &b, n, 1))
            .collect::<Result<_>>()?;
        // The switch lives in its cables' far ends: `lan` needs no handle of its own.
        Ok(Lab {
            a,
            b,
            witness,
            client,
            uplinks,
            links,
            user_links,
        })
    }
}

fn dedicated(a: &Host, b: &Host, n: u8) -> Result<Cable> {
    let dev = format!("link{n}");
    let cable = Cable::lay(a.net(), &dev, b.net(), &dev)?;
    for (host, ip) in [(a, addr::link_a(n)), (b, addr::link_b(n))] {
        netlink::add_address(host.net(), &dev, ip, addr::LINK_PREFIX)?;
        netlink::set_up(host.net(), &dev, true)?;
    }
    Ok(cable)
}
