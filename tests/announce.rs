//! Rule 14 from outside: what a client's host on the network hears after a failover.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Clients, GUEST, alone, protected};
use testkit::net::Capture;
use testkit::site::{Side, SiteSpec};
use testkit::{require_kvm, require_lab};

const ARP: u16 = 0x0806;
const RARP: u16 = 0x8035;

/// RARP, by which bridges learn where a MAC is.
fn is_rarp(frame: &[u8]) -> bool {
    frame[12..14] == RARP.to_be_bytes()
}

/// A broadcast ARP request whose sender asks for its own address, the guest's.
fn is_gratuitous_arp(frame: &[u8]) -> bool {
    let guest = GUEST.octets();
    frame.len() >= 42
        && frame[..6] == [0xff; 6]
        && frame[12..22] == [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]
        && frame[28..32] == guest
        && frame[38..42] == guest
}

/// The shadow knows the guest's addresses before it is promoted: also the first announcement has them.
#[test]
fn every_announcement_after_a_failover_has_the_guests_address() {
    require_kvm!();
    require_lab!();
    let _alone = alone();
    let site = protected(SiteSpec::default(), &[]);
    let clients = Clients::start(&site);
    let wanted = |frame: &[u8]| is_rarp(frame) || is_gratuitous_arp(frame);
    let capture = Capture::start(site.lab.client.net(), "uplink", &[ARP, RARP], wanted).unwrap();
    clients.go_on(100);
    let killed = site.host(Side::A).kill_all().unwrap();
    clients.go_on(200);
    let heard = capture.stop().unwrap();
    clients.are_content();

    // The side that dies announces its guest, too, for some seconds after its start; and a bridge may begin to
    // forward in the middle of an announcement.
    let heard: Vec<_> = heard
        .into_iter()
        .filter(|(at, _)| *at >= killed.at)
        .skip_while(|(_, frame)| !is_rarp(frame))
        .collect();
    let kinds: Vec<bool> = heard.iter().map(|(_, frame)| is_rarp(frame)).collect();
    assert!(kinds.len() >= 4, "announcements are repeated: {heard:x?}");
    // RARP and ARP by turns, RARP first: no announcement is without the address.
    let by_turns: Vec<bool> = (0..kinds.len()).map(|n| n % 2 == 0).collect();
    assert_eq!(kinds, by_turns, "{heard:x?}");
    let mac = &heard[0].1[6..12];
    for (_, frame) in &heard {
        assert_eq!(&frame[6..12], mac);
        // The address the ARP body gives is the same: hosts believe that one.
        assert_eq!(&frame[22..28], mac);
    }
}
