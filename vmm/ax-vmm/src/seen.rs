//! Which addresses the guest has, learned from the frames it sends (rule 14).
//!
//! Frames are the guest's own bytes: every length is checked, and what is kept is bounded. ARP and
//! neighbour discovery claim an address; the source of an IPv4 packet does not, since a guest that
//! routes sends other hosts' packets too. It counts only for a guest that has claimed none.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::announce::{ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, icmpv6_checksum};

/// Addresses remembered per network device: those claimed last.
const REMEMBERED: usize = 64;

const ICMPV6: u8 = 58;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// Bytes of an IPv6 header, and of a neighbour message without options.
const IPV6_HEADER: usize = 40;
const NEIGHBOUR: usize = 24;

/// The bytes `frame` carries as `ethertype`, if `mac` sent it.
fn payload_of(mac: [u8; 6], frame: &[u8]) -> Option<(u16, &[u8])> {
    let (header, payload) = frame.split_first_chunk::<14>()?;
    let [_, _, _, _, _, _, from @ .., high, low] = header;
    (*from == mac).then_some((u16::from_be_bytes([*high, *low]), payload))
}

fn v4(bytes: &[u8]) -> Option<Ipv4Addr> {
    let address = Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?);
    let usable = !address.is_unspecified()
        && !address.is_multicast()
        && !address.is_broadcast()
        && !address.is_loopback();
    usable.then_some(address)
}

fn v6(bytes: &[u8]) -> Option<Ipv6Addr> {
    let address = Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?);
    let usable = !address.is_unspecified() && !address.is_multicast() && !address.is_loopback();
    usable.then_some(address)
}

/// The sender of an ARP request or reply (RFC 826) for IPv4 over Ethernet.
fn arp_sender(mac: [u8; 6], body: &[u8]) -> Option<Ipv4Addr> {
    let body = body.get(..28)?;
    let known =
        body.starts_with(&[0, 1, 8, 0, 6, 4, 0, 1]) || body.starts_with(&[0, 1, 8, 0, 6, 4, 0, 2]);
    (known && body.get(8..14)? == mac).then(|| v4(body.get(14..18)?))?
}

/// The address a neighbour solicitation comes from or an advertisement is about (RFC 4861, 7.1).
fn neighbour(packet: &[u8]) -> Option<Ipv6Addr> {
    let (header, rest) = packet.split_at_checked(IPV6_HEADER)?;
    let [version, _, _, _, high, low, ICMPV6, 255, ..] = header else {
        return None;
    };
    let icmp = rest.get(..usize::from(u16::from_be_bytes([*high, *low])))?;
    if version >> 4 != 6 || icmp.len() < NEIGHBOUR {
        return None;
    }
    let address = match icmp.first_chunk::<2>()? {
        [NEIGHBOUR_SOLICITATION, 0] => v6(header.get(8..24)?)?,
        [NEIGHBOUR_ADVERTISEMENT, 0] => v6(icmp.get(8..24)?)?,
        _ => return None,
    };
    // Over a right message, its own checksum included, the sum is zero.
    (icmpv6_checksum(header, icmp) == 0).then_some(address)
}

/// The source of an IPv4 packet.
fn ipv4_source(packet: &[u8]) -> Option<Ipv4Addr> {
    let header = packet.get(..20)?;
    let [first, _, high, low, ..] = header else {
        return None;
    };
    let (length, total) = (
        usize::from(first & 15) * 4,
        usize::from(u16::from_be_bytes([*high, *low])),
    );
    let whole = first >> 4 == 4 && length >= 20 && total >= length && packet.len() >= total;
    whole.then(|| v4(header.get(12..16)?))?
}

/// The addresses of one network device's guest, the [`REMEMBERED`] claimed last.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Oldest first.
    claimed: Vec<IpAddr>,
    used: Option<Ipv4Addr>,
}

impl Seen {
    /// Learns from one frame sent by the guest. Cheap for most: they carry no claim.
    pub fn learn(&mut self, mac: [u8; 6], frame: &[u8]) {
        match payload_of(mac, frame) {
            Some((ETHERTYPE_ARP, body)) => self.claim(arp_sender(mac, body).map(IpAddr::V4)),
            Some((ETHERTYPE_IPV6, packet)) => self.claim(neighbour(packet).map(IpAddr::V6)),
            Some((ETHERTYPE_IPV4, packet)) if self.claimed.is_empty() => {
                self.used = ipv4_source(packet).or(self.used);
            }
            _ => {}
        }
    }

    fn claim(&mut self, address: Option<IpAddr>) {
        let Some(address) = address else { return };
        if self.claimed.last() == Some(&address) {
            return;
        }
        self.claimed.retain(|known| *known != address);
        if self.claimed.len() == REMEMBERED {
            self.claimed.remove(0);
        }
        self.claimed.push(address);
    }

    /// What is worth announcing.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let used = self.used.filter(|_| self.claimed.is_empty());
        self.claimed.iter().copied().chain(used.map(IpAddr::V4))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::announce::{advertisement, arp, ethernet};

    const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
    const OTHER: [u8; 6] = [9; 6];
    const NOTHING: [IpAddr; 0] = [];

    fn learned(frames: &[Vec<u8>]) -> Vec<IpAddr> {
        let mut seen = Seen::default();
        frames.iter().for_each(|frame| seen.learn(MAC, frame));
        seen.addresses().collect()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn arp_of(operation: u16, mac: [u8; 6], sender: [u8; 4]) -> Vec<u8> {
        let body = arp(operation, mac, sender.into(), [0; 6]);
        ethernet([0xff; 6], MAC, ETHERTYPE_ARP, &body)
    }

    fn packet(source: [u8; 4]) -> Vec<u8> {
        let mut ipv4 = vec![0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0];
        ipv4.extend_from_slice(&source);
        ipv4.extend_from_slice(&[10, 0, 0, 9]);
        ethernet(OTHER, MAC, ETHERTYPE_IPV4, &ipv4)
    }

    #[test]
    fn claims_are_learned_from_arp_and_neighbour_discovery() {
        let v6 = advertisement(MAC, "fe80::1".parse().unwrap());
        let frames = [
            arp_of(1, MAC, [10, 0, 0, 1]),
            arp_of(2, MAC, [10, 0, 0, 2]),
            v6,
        ];
        assert_eq!(
            learned(&frames),
            [ip("10.0.0.1"), ip("10.0.0.2"), ip("fe80::1")]
        );
    }

    /// A neighbour message with its checksum made right.
    fn summed(mut frame: Vec<u8>) -> Vec<u8> {
        frame[56..58].fill(0);
        let (header, icmp) = frame[14..86].split_at(IPV6_HEADER);
        let sum = icmpv6_checksum(header, icmp);
        frame[56..58].copy_from_slice(&sum.to_be_bytes());
        frame
    }

    #[test]
    fn a_solicitation_claims_its_source_but_not_what_it_asks_for() {
        // An advertisement made into a solicitation: source fe80::1, target fe80::7.
        let mut frame = advertisement(MAC, "fe80::1".parse().unwrap());
        frame[54] = NEIGHBOUR_SOLICITATION;
        frame[77] = 7;
        assert_eq!(learned(&[summed(frame.clone())]), [ip("fe80::1")]);
        // Asking whether an address is free claims nothing.
        frame[22..38].fill(0);
        assert_eq!(learned(&[summed(frame)]), NOTHING);
    }

    #[test]
    fn the_source_of_packets_counts_only_without_a_claim() {
        assert_eq!(learned(&[packet([10, 0, 0, 5])]), [ip("10.0.0.5")]);
        let frames = [
            packet([10, 0, 0, 5]),
            arp_of(1, MAC, [10, 0, 0, 1]),
            packet([10, 0, 0, 6]),
        ];
        assert_eq!(learned(&frames), [ip("10.0.0.1")]);
    }

    #[test]
    fn what_is_not_the_guests_to_claim_is_not_learned() {
        let mut foreign = arp_of(1, MAC, [10, 0, 0, 1]);
        foreign[6..12].copy_from_slice(&OTHER);
        let frames = [
            foreign,
            arp_of(1, OTHER, [10, 0, 0, 2]),
            arp_of(3, MAC, [10, 0, 0, 3]),
            arp_of(1, MAC, [0, 0, 0, 0]),
            arp_of(1, MAC, [224, 0, 0, 1]),
            arp_of(1, MAC, [255; 4]),
            packet([127, 0, 0, 1]),
            advertisement(MAC, "ff02::1".parse().unwrap()),
            advertisement(MAC, "::1".parse().unwrap()),
        ];
        assert_eq!(learned(&frames), NOTHING);
    }

    #[test]
    fn frames_cut_short_or_changed_anywhere_teach_nothing_wrong() {
        let right = [
            arp_of(2, MAC, [10, 0, 0, 1]),
            advertisement(MAC, "fe80::1".parse().unwrap()),
            packet([10, 0, 0, 1]),
        ];
        for frame in &right {
            let needed = match frame[12..14] {
                [8, 6] => 42,
                [8, 0] => 34,
                _ => frame.len(),
            };
            for len in 0..needed {
                assert_eq!(
                    learned(&[frame[..len].to_vec()]),
                    NOTHING,
                    "{len} of {frame:x?}"
                );
            }
        }
        // A neighbour message with any byte changed fails its checksum or is no such message.
        let message = &right[1];
        for at in 14..message.len() {
            let mut changed = message.clone();
            changed[at] ^= 0x10;
            let found = learned(&[changed]);
            assert!(
                found.is_empty() || (15..18).contains(&at),
                "byte {at}: {found:?}"
            );
        }
    }

    #[test]
    fn the_latest_claims_are_kept_however_many_come() {
        let claim = |n: u32| arp_of(1, MAC, (0x0a00_0001 + n).to_be_bytes());
        let frames: Vec<_> = (0..1000).chain([990]).map(claim).collect();
        let found = learned(&frames);
        assert_eq!(found.len(), REMEMBERED);
        assert_eq!(found.last(), Some(&ip("10.0.3.223")));
        assert!(!found.contains(&ip("10.0.0.1")));
    }
}
