//! AX, as the benches have it: a site with a witness, mutual TLS, default configuration.

use testkit::net::{GUEST, addr};
use testkit::site::{Side, Site, SiteSpec};

use super::{Guest, MAC};
use crate::Error;

const VM: &str = "peers";

/// The guest on a site of its own.
pub struct Ax {
    /// The site.
    pub site: Site,
}

impl Ax {
    /// Starts it on host a, as protected as `mode` says.
    pub fn start(guest: &Guest, mode: &str) -> Result<Ax, Error> {
        let site = Site::new(SiteSpec::default())?;
        let words = words(guest, mode);
        site.run_axvm(
            Side::A,
            &words.iter().map(String::as_str).collect::<Vec<_>>(),
        )?;
        let shown = site.show(Side::A, VM)?;
        if shown["primary"] != Side::A.name() {
            return Err(Error::Failed(format!(
                "the guest is not on host a: {shown}"
            )));
        }
        Ok(Ax { site })
    }

    /// How it is set, for the reader.
    pub fn settings(guest: &Guest, mode: &str) -> Vec<String> {
        vec![
            format!("axvm {}", words(guest, mode).join(" ")),
            "default configuration; mutual TLS; a witness, whose CPU is counted, too".into(),
        ]
    }
}

fn words(guest: &Guest, mode: &str) -> Vec<String> {
    let cmdline = format!("ip={GUEST}/{}", addr::LAN_PREFIX);
    let net = format!("tap=axtap0,mac={MAC}");
    let (cpus, memory) = (guest.cpus.to_string(), guest.memory.as_str());
    let options = [
        ["--mode", mode],
        ["--memory", memory],
        ["--cpus", &cpus],
        ["--disk", "disk.img,size=64M"],
        ["--net", &net],
        ["--cmdline", &cmdline],
    ];
    let mut words = vec!["start".to_string(), VM.into(), "--probe".into()];
    words.extend(options.as_flattened().iter().map(ToString::to_string));
    words
}
