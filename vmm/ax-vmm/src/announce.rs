//! After a promotion the network is told where the guest is now (rule 14).
//!
//! A RARP frame per MAC teaches every bridge the new port. For addresses seen in the guest's own
//! frames, a gratuitous ARP (RFC 5227) or an unsolicited neighbour advertisement (RFC 4861) does the
//! same for hosts that would rather hear of an address.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;

/// Addresses remembered per network device.
const REMEMBERED: usize = 64;

/// A frame shorter than Ethernet's minimum is padded with zeros.
const MIN_FRAME: usize = 60;

fn ethernet(to: [u8; 6], from: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(MIN_FRAME.max(14 + payload.len()));
    frame.extend_from_slice(&to);
    frame.extend_from_slice(&from);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame.extend_from_slice(payload);
    frame.resize(frame.len().max(MIN_FRAME), 0);
    frame
}

/// An (R)ARP payload, RFC 826 and RFC 903.
fn arp(operation: u16, mac: [u8; 6], sender: Ipv4Addr, target_mac: [u8; 6]) -> Vec<u8> {
    let mut body = vec![0, 1, 8, 0, 6, 4];
    body.extend_from_slice(&operation.to_be_bytes());
    body.extend_from_slice(&mac);
    body.extend_from_slice(&sender.octets());
    body.extend_from_slice(&target_mac);
    body.extend_from_slice(&sender.octets());
    body
}

/// An unsolicited neighbour advertisement with the override flag, to all nodes.
fn advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut icmp = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    icmp.extend_from_slice(&address.octets());
    icmp.extend_from_slice(&[2, 1]);
    icmp.extend_from_slice(&mac);
    let mut pseudo = Vec::with_capacity(80);
    pseudo.extend_from_slice(&address.octets());
    pseudo.extend_from_slice(&all_nodes.octets());
    pseudo.extend_from_slice(&(icmp.len() as u32).to_be_bytes());
    pseudo.extend_from_slice(&[0, 0, 0, 58]);
    pseudo.extend_from_slice(&icmp);
    let sum = checksum(&pseudo);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend_from_slice(&(icmp.len() as u16).to_be_bytes());
    packet.extend_from_slice(&[58, 255]);
    packet.extend_from_slice(&address.octets());
    packet.extend_from_slice(&all_nodes.octets());
    packet.extend_from_slice(&icmp);
    ethernet([0x33, 0x33, 0, 0, 0, 1], mac, ETHERTYPE_IPV6, &packet)
}

/// The Internet checksum, RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The address a guest's own frame claims as its sender's, if it is one worth announcing.
pub fn sender_address(mac: [u8; 6], frame: &[u8]) -> Option<IpAddr> {
    if frame.get(6..12)? != mac {
        return None;
    }
    let ethertype = u16::from_be_bytes(frame.get(12..14)?.try_into().ok()?);
    let address: IpAddr = match ethertype {
        ETHERTYPE_ARP => <[u8; 4]>::try_from(frame.get(28..32)?).ok()?.into(),
        ETHERTYPE_IPV4 => <[u8; 4]>::try_from(frame.get(26..30)?).ok()?.into(),
        ETHERTYPE_IPV6 => <[u8; 16]>::try_from(frame.get(22..38)?).ok()?.into(),
        _ => return None,
    };
    (!address.is_unspecified() && !address.is_multicast()).then_some(address)
}

/// Addresses one network device's guest frames were sent from, the first [`REMEMBERED`] of them.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    addresses: BTreeSet<IpAddr>,
    last: Option<IpAddr>,
}

impl Seen {
    /// Learns from one frame sent by the guest.
    pub fn learn(&mut self, mac: [u8; 6], frame: &[u8]) {
        let address = sender_address(mac, frame);
        if address.is_some() && address != self.last {
            self.last = address;
            if self.addresses.len() < REMEMBERED {
                self.addresses.extend(address);
            }
        }
    }
}

/// The frames that announce one network device.
pub fn frames(mac: [u8; 6], seen: &Seen) -> Vec<Vec<u8>> {
    let rarp = arp(3, mac, Ipv4Addr::UNSPECIFIED, mac);
    let mut all = vec![ethernet(BROADCAST, mac, ETHERTYPE_RARP, &rarp)];
    all.extend(seen.addresses.iter().map(|address| match *address {
        IpAddr::V4(v4) => ethernet(BROADCAST, mac, ETHERTYPE_ARP, &arp(1, mac, v4, [0; 6])),
        IpAddr::V6(v6) => advertisement(mac, v6),
    }));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

    #[test]
    fn a_device_announces_its_mac_and_the_addresses_it_used() {
        let v4 = Ipv4Addr::new(10, 77, 0, 10);
        let v6: Ipv6Addr = "fe80::1".parse().unwrap();
        let mut seen = Seen::default();
        seen.learn(
            MAC,
            &ethernet(BROADCAST, MAC, ETHERTYPE_ARP, &arp(1, MAC, v4, [0; 6])),
        );
        seen.learn(MAC, &advertisement(MAC, v6));
        seen.learn(
            MAC,
            &ethernet(
                BROADCAST,
                [9; 6],
                ETHERTYPE_ARP,
                &arp(1, [9; 6], v4, [0; 6]),
            ),
        );
        let all = frames(MAC, &seen);
        assert_eq!(all.len(), 3);
        assert!(all.iter().all(|f| f.len() >= MIN_FRAME && f[6..12] == MAC));
        assert_eq!(all[0][12..14], ETHERTYPE_RARP.to_be_bytes());
        assert_eq!(sender_address(MAC, &all[1]), Some(v4.into()));
        assert_eq!(sender_address(MAC, &all[2]), Some(v6.into()));
    }

    #[test]
    fn the_advertisements_checksum_is_right() {
        let frame = advertisement(MAC, "fe80::2".parse().unwrap());
        let (ip, icmp) = (&frame[14..54], &frame[54..54 + 32]);
        let mut pseudo = ip[8..40].to_vec();
        pseudo.extend_from_slice(&32u32.to_be_bytes());
        pseudo.extend_from_slice(&[0, 0, 0, 58]);
        pseudo.extend_from_slice(icmp);
        assert_eq!(checksum(&pseudo), 0);
    }

    #[test]
    fn short_and_foreign_frames_teach_nothing() {
        for len in 0..60 {
            assert_eq!(sender_address(MAC, &vec![0; len]), None);
        }
    }
}
