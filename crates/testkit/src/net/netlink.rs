//! Changes to the network inside one namespace, by rtnetlink: no `ip` or `tc` tool is needed.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::future::Future;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use futures_util::StreamExt;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{BridgeStpState, InfoData, InfoVeth};
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use rtnetlink::{Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, new_connection};

use super::NetNs;
use crate::{Error, Result};

type NetlinkResult = std::result::Result<(), rtnetlink::Error>;

/// Runs one conversation with the kernel inside `ns`.
fn talk<F, Fut>(ns: &NetNs, what: String, f: F) -> Result<()>
where
    F: FnOnce(Handle) -> Fut + Send,
    Fut: Future<Output = NetlinkResult>,
{
    let what = format!("{}: {what}", ns.name());
    ns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(Error::os("start a runtime for netlink"))?;
        runtime.block_on(async {
            let (connection, handle, _) =
                new_connection().map_err(Error::os("open a netlink socket"))?;
            tokio::spawn(connection);
            f(handle)
                .await
                .map_err(|source| Error::Netlink { what, source })
        })
    })?
}

/// Index of interface `dev` in the calling thread's namespace.
fn index(dev: &str) -> std::result::Result<u32, rtnetlink::Error> {
    nix::net::if_::if_nametoindex(dev)
        .map_err(|e| rtnetlink::Error::InvalidNla(format!("interface {dev}: {e}")))
}

/// Sets `dev` administratively up or down.
pub(super) fn set_up(ns: &NetNs, dev: &str, up: bool) -> Result<()> {
    talk(
        ns,
        format!("set {dev} {}", if up { "up" } else { "down" }),
        |h| async move {
            let link = LinkUnspec::new_with_index(index(dev)?);
            let link = if up { link.up() } else { link.down() };
            h.link().set(link.build()).execute().await
        },
    )
}

/// A bridge that forwards at once: no spanning tree, no delay, no multicast snooping.
pub(super) fn add_bridge(ns: &NetNs, bridge: &str) -> Result<()> {
    talk(ns, format!("make bridge {bridge}"), |h| async move {
        let message = LinkBridge::new(bridge)
            .stp_state(BridgeStpState::Disabled)
            .forward_delay(0)
            .mcast_snooping(false)
            .up()
            .build();
        h.link().add(message).execute().await
    })
}

/// A cable: `dev_a` in `a`, `dev_b` in `b`, both still down.
pub(super) fn add_veth(a: &NetNs, dev_a: &str, b: &NetNs, dev_b: &str) -> Result<()> {
    let peer_ns = b.as_raw_fd();
    talk(
        a,
        format!("lay a cable from {dev_a} to {dev_b} in {}", b.name()),
        |h| async move {
            let peer = LinkMessageBuilder::<LinkUnspec>::new()
                .name(dev_b.to_string())
                .setns_by_fd(peer_ns)
                .build();
            let message = LinkVeth::new(dev_a, dev_b)
                .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
                .build();
            h.link().add(message).execute().await
        },
    )
}

/// Plugs `dev` into `bridge` and sets it up.
pub(super) fn attach(ns: &NetNs, dev: &str, bridge: &str) -> Result<()> {
    talk(ns, format!("plug {dev} into {bridge}"), |h| async move {
        let message = LinkUnspec::new_with_index(index(dev)?)
            .controller(index(bridge)?)
            .up()
            .build();
        h.link().set(message).execute().await
    })
}

/// Gives `dev` an IPv4 address.
pub(super) fn add_address(ns: &NetNs, dev: &str, ip: Ipv4Addr, prefix: u8) -> Result<()> {
    talk(ns, format!("give {dev} {ip}/{prefix}"), |h| async move {
        h.address()
            .add(index(dev)?, ip.into(), prefix)
            .execute()
            .await
    })
}

/// Makes `dev` swallow (or send again) whatever it is given to transmit: the `blackhole` queueing
/// discipline is part of every kernel that has any. Unlike link down, nobody sees a carrier go.
pub(super) fn set_silent(ns: &NetNs, dev: &str, silent: bool) -> Result<()> {
    talk(
        ns,
        format!("{} {dev}", if silent { "silence" } else { "unsilence" }),
        |h| async move {
            let index = i32::try_from(index(dev)?)
                .map_err(|_| rtnetlink::Error::InvalidNla(format!("index of {dev}")))?;
            let mut message = TcMessage::with_index(index);
            message.header.parent = TcHandle::ROOT;
            let (message, flags) = if silent {
                message
                    .attributes
                    .push(TcAttribute::Kind("blackhole".into()));
                (
                    RouteNetlinkMessage::NewQueueDiscipline(message),
                    NLM_F_CREATE | NLM_F_REPLACE,
                )
            } else {
                (RouteNetlinkMessage::DelQueueDiscipline(message), 0)
            };
            request(h, message, flags).await
        },
    )
}

async fn request(mut h: Handle, message: RouteNetlinkMessage, flags: u16) -> NetlinkResult {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    let mut answers = h.request(request)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(e) = answer.payload
            && e.code.is_some()
        {
            return Err(rtnetlink::Error::NetlinkError(e));
        }
    }
    Ok(())
}

// <linux/if_tun.h>
nix::ioctl_write_int!(tun_set_iff, b'T', 202);
nix::ioctl_write_int!(tun_set_persist, b'T', 203);
nix::ioctl_write_int!(tun_set_owner, b'T', 204);

/// Attaches to tap `tap` in `ns`, which is made if it is not there. Reads do not block.
pub(super) fn open_tap(ns: &NetNs, tap: &str) -> Result<File> {
    let name = CString::new(tap).map_err(|e| Error::os(format!("tap name {tap:?}"))(e.into()))?;
    if name.as_bytes_with_nul().len() > libc::IFNAMSIZ {
        return Err(Error::os(format!("tap name {tap:?}"))(
            nix::Error::ENAMETOOLONG.into(),
        ));
    }
    ns.run(|| {
        let tun = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(Error::os("open /dev/net/tun for a tap"))?;
        // SAFETY: ifreq is plain old data; all zeroes is a value of it.
        let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in ifreq.ifr_name.iter_mut().zip(name.as_bytes()) {
            *to = *from as libc::c_char;
        }
        ifreq.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
        unsafe { tun_set_iff(tun.as_raw_fd(), &raw mut ifreq as libc::c_ulong) }
            .map_err(tap_error(ns, tap, "make"))?;
        Ok(tun)
    })?
}

fn tap_error(ns: &NetNs, tap: &str, what: &str) -> impl FnOnce(nix::Error) -> Error {
    let what = format!("{}: {what} tap {tap}", ns.name());
    move |e| Error::os(what)(e.into())
}

/// A tap that stays when nobody has it open, owned by this user, so that a VMM attaches to it by
/// name without privileges.
pub(super) fn add_tap(ns: &NetNs, tap: &str) -> Result<()> {
    let tun = open_tap(ns, tap)?;
    let fd = tun.as_raw_fd();
    // SAFETY: TUNSETOWNER takes a uid by value.
    unsafe { tun_set_owner(fd, nix::unistd::geteuid().as_raw().into()) }
        .map_err(tap_error(ns, tap, "own"))?;
    // SAFETY: TUNSETPERSIST takes a flag by value.
    unsafe { tun_set_persist(fd, 1) }.map_err(tap_error(ns, tap, "keep"))?;
    Ok(())
}
