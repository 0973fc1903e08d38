//! The kernel command line.

use alloc::vec::Vec;
use core::net::Ipv4Addr;

use crate::command::Button;

/// One `virtio_mmio.device=SIZE@ADDR:IRQ` item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Guest-physical address of the register window.
    pub addr: u64,
    /// Pin of the I/O APIC.
    pub irq: u8,
}

/// An address with the length of its prefix in bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    /// The interface's address.
    pub addr: Ipv4Addr,
    /// 0 to 32.
    pub prefix: u8,
}

/// Everything the guest understands. Unknown words are ignored, and so are known ones whose value
/// cannot be read: a guest that boots can say so, one that does not cannot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cmdline {
    /// Device windows in the order given.
    pub windows: Vec<Window>,
    /// `ip=`: the n-th belongs to the n-th network device.
    pub ips: Vec<Cidr>,
    /// `gw=`: default gateway of the first network device.
    pub gateway: Option<Ipv4Addr>,
    /// `cpus=`: how many CPUs to run on, 1 to 8.
    pub cpus: usize,
    /// `button=`: what it does when its power button is pressed.
    pub button: Button,
    /// `net=offload`, `net=plain`: whether network devices compute checksums and give it large segments, if
    /// they offer to; they do by default.
    pub offload: bool,
    /// `quiet`: nothing on the console but answers, panics and the ready line.
    pub quiet: bool,
}

/// Most CPUs the guest runs on.
pub const MAX_CPUS: usize = 8;
/// Most device windows taken from the command line.
pub const MAX_WINDOWS: usize = 32;
const PINS: u8 = 24;

impl Cmdline {
    /// Reads a command line.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut it = Self {
            windows: Vec::new(),
            ips: Vec::new(),
            gateway: None,
            cpus: 1,
            button: Button::Unheard,
            offload: true,
            quiet: false,
        };
        for word in text.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match key {
                "virtio_mmio.device" => {
                    if let Some(w) = window(value)
                        && it.windows.len() < MAX_WINDOWS
                    {
                        it.windows.push(w);
                    }
                }
                "ip" => it.ips.extend(cidr(value)),
                "gw" => it.gateway = value.parse().ok().or(it.gateway),
                "cpus" => {
                    if let Ok(n) = value.parse::<usize>() {
                        it.cpus = n.clamp(1, MAX_CPUS);
                    }
                }
                "button" => it.button = Button::parse(value).unwrap_or(it.button),
                "net" => match value {
                    "plain" => it.offload = false,
                    "offload" => it.offload = true,
                    _ => {}
                },
                "quiet" => it.quiet = true,
                _ => {}
            }
        }
        it
    }
}

/// `512@0xfeb00000:5`; an optional `:ID` may follow. Windows lie between 3 and 4 GiB.
fn window(value: &str) -> Option<Window> {
    let (_size, rest) = value.split_once('@')?;
    let mut parts = rest.split(':');
    let addr = number(parts.next()?)?;
    let irq = u8::try_from(number(parts.next()?)?).ok()?;
    let in_gap = (0xc000_0000..0xffff_f000).contains(&addr) && addr.is_multiple_of(4);
    (in_gap && irq < PINS).then_some(Window { addr, irq })
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn cidr(value: &str) -> Option<Cidr> {
    let (addr, prefix) = value.split_once('/').unwrap_or((value, "24"));
    let prefix = prefix.parse::<u8>().ok().filter(|p| *p <= 32)?;
    Some(Cidr {
        addr: addr.parse().ok()?,
        prefix,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_machines_pass() {
        let it = Cmdline::parse(
            "console=ttyS0 virtio_mmio.device=4K@0xd0000000:5 ip=10.77.0.10/16 cpus=4 \
             virtio_mmio.device=512@0xfeb00e00:12:3 gw=10.77.0.1 quiet ip=10.78.0.2 button=poweroff",
        );
        assert_eq!(
            it.windows,
            [
                Window {
                    addr: 0xd000_0000,
                    irq: 5
                },
                Window {
                    addr: 0xfeb0_0e00,
                    irq: 12
                }
            ]
        );
        assert_eq!(
            it.ips[0],
            Cidr {
                addr: Ipv4Addr::new(10, 77, 0, 10),
                prefix: 16
            }
        );
        assert_eq!(
            it.ips[1],
            Cidr {
                addr: Ipv4Addr::new(10, 78, 0, 2),
                prefix: 24
            }
        );
        assert_eq!(it.gateway, Some(Ipv4Addr::new(10, 77, 0, 1)));
        assert_eq!((it.cpus, it.quiet, it.offload), (4, true, true));
        assert!(!Cmdline::parse("net=plain").offload);
        assert!(Cmdline::parse("net=plain net=offload net=x").offload);
        assert_eq!(it.button, Button::Poweroff);
    }

    #[test]
    fn ignores_what_it_cannot_use() {
        let it = Cmdline::parse(
            "virtio_mmio.device=4K@0x1000:5 virtio_mmio.device=4K@0xd0000000:99 \
             virtio_mmio.device=x ip=1.2.3/8 ip=1.2.3.4/33 cpus=lots gw=no button=loud",
        );
        assert_eq!(it, Cmdline::parse(""));
        assert_eq!(Cmdline::parse("cpus=400").cpus, MAX_CPUS);
        assert_eq!(Cmdline::parse("cpus=0").cpus, 1);
    }
}
