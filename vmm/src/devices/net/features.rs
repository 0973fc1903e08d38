//! What the device offers, and what is agreed on (virtio 1.2, 5.1.3).

use ax_wire::offload::Offloads;
use virtio_bindings::virtio_net::*;

use super::super::transport::Transport;

/// What a driver may leave to the host, or take over from it.
const OFFLOAD: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// The features of a device with or without offloads.
pub(super) fn offered(offload: bool) -> u64 {
    1 << VIRTIO_NET_F_MAC | if offload { OFFLOAD } else { 0 }
}

/// What the guest's frames may leave to the host. A driver that accepts a feature without those that it needs
/// (5.1.3.1) has not accepted it.
pub(super) fn host(transport: &Transport) -> Offloads {
    agreed(
        transport,
        [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
        ],
    )
}

/// What received frames may leave to the guest.
pub(super) fn guest(transport: &Transport) -> Offloads {
    agreed(
        transport,
        [
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
        ],
    )
}

/// Whether a received frame may take several buffers.
pub(super) fn merges(transport: &Transport) -> bool {
    transport.accepted(VIRTIO_NET_F_MRG_RXBUF)
}

fn agreed(transport: &Transport, bits: [u32; 4]) -> Offloads {
    let [checksum, tso4, tso6, ecn] =
        bits.map(|bit| transport.negotiated() && transport.accepted(bit));
    Offloads {
        checksum,
        tso4,
        tso6,
        ecn,
    }
    .usable()
}
