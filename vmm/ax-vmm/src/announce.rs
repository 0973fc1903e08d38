//! After a promotion the network is told where the guest is now (rule 14).
//!
//! A RARP frame per MAC teaches every bridge the new port. For addresses seen in the guest's own
//! frames, a gratuitous ARP (RFC 5227) or an unsolicited neighbour advertisement (RFC 4861) does the
//! same for hosts that would rather hear of an address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::seen::Seen;

const BROADCAST: [u8; 6] = [0xff; 6];
pub const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
pub const ETHERTYPE_IPV4: u16 = 0x0800;
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

/// A frame shorter than Ethernet's minimum is padded with zeros.
const MIN_FRAME: usize = 60;

/// An Ethernet frame.
pub fn ethernet(to: [u8; 6], from: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(MIN_FRAME.max(14 + payload.len()));
    frame.extend_from_slice(&to);
    frame.extend_from_slice(&from);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame.extend_from_slice(payload);
    frame.resize(frame.len().max(MIN_FRAME), 0);
    frame
}

/// An (R)ARP payload, RFC 826 and RFC 903.
pub fn arp(operation: u16, mac: [u8; 6], sender: Ipv4Addr, target_mac: [u8; 6]) -> Vec<u8> {
    let mut body = vec![0, 1, 8, 0, 6, 4];
    body.extend_from_slice(&operation.to_be_bytes());
    body.extend_from_slice(&mac);
    body.extend_from_slice(&sender.octets());
    body.extend_from_slice(&target_mac);
    body.extend_from_slice(&sender.octets());
    body
}

/// An unsolicited neighbour advertisement with the override flag, to all nodes.
pub fn advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut icmp = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    icmp.extend_from_slice(&address.octets());
    icmp.extend_from_slice(&[2, 1]);
    icmp.extend_from_slice(&mac);
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend_from_slice(&(icmp.len() as u16).to_be_bytes());
    packet.extend_from_slice(&[58, 255]);
    packet.extend_from_slice(&address.octets());
    packet.extend_from_slice(&all_nodes.octets());
    let sum = icmpv6_checksum(&packet, &icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    packet.extend_from_slice(&icmp);
    ethernet([0x33, 0x33, 0, 0, 0, 1], mac, ETHERTYPE_IPV6, &packet)
}

/// The checksum of an ICMPv6 message (RFC 4443, 2.3) after this IPv6 header: the Internet checksum
/// (RFC 1071) over addresses, length, next header and message.
pub fn icmpv6_checksum(header: &[u8], message: &[u8]) -> u16 {
    let addresses = header.get(8..40).unwrap_or_default();
    let pairs = addresses.chunks(2).chain(message.chunks(2));
    let mut sum: u32 = pairs
        .map(|pair| match *pair {
            [high, low] => u32::from(u16::from_be_bytes([high, low])),
            [last] => u32::from(last) << 8,
            _ => 0,
        })
        .sum();
    sum += message.len() as u32 + 58;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The frames that announce one network device.
pub fn frames(mac: [u8; 6], seen: &Seen) -> Vec<Vec<u8>> {
    let rarp = arp(3, mac, Ipv4Addr::UNSPECIFIED, mac);
    let mut all = vec![ethernet(BROADCAST, mac, ETHERTYPE_RARP, &rarp)];
    all.extend(seen.addresses().map(|address| match address {
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
    fn a_device_announces_its_mac_and_the_addresses_it_claimed() {
        let v4 = Ipv4Addr::new(10, 77, 0, 10);
        let v6: Ipv6Addr = "fe80::1".parse().unwrap();
        let mut seen = Seen::default();
        let reply = arp(2, MAC, v4, [9; 6]);
        seen.learn(MAC, &ethernet([9; 6], MAC, ETHERTYPE_ARP, &reply));
        seen.learn(MAC, &advertisement(MAC, v6));
        let all = frames(MAC, &seen);
        assert_eq!(all.len(), 3);
        assert!(all.iter().all(|f| f.len() >= MIN_FRAME && f[6..12] == MAC));
        assert_eq!(all[0][12..14], ETHERTYPE_RARP.to_be_bytes());
        // Gratuitous: a broadcast request whose sender and target are the address.
        assert_eq!(all[1][..6], BROADCAST);
        assert_eq!(all[1][20..22], [0, 1]);
        assert_eq!(all[1][28..32], v4.octets());
        assert_eq!(all[1][38..42], v4.octets());
        assert_eq!(all[2], advertisement(MAC, v6));
    }

    #[test]
    fn the_advertisements_checksum_is_right() {
        let frame = advertisement(MAC, "fe80::2".parse().unwrap());
        assert_eq!(icmpv6_checksum(&frame[14..54], &frame[54..86]), 0);
        // As computed by hand for a message of odd length: 0x3a + 3 + 0x0102 + 0x0300.
        assert_eq!(
            icmpv6_checksum(&[0; 40], &[1, 2, 3]),
            !(58 + 3 + 0x0102 + 0x0300)
        );
    }
}
