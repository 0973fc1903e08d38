//! What is measured: the systems and the cases, by the names they have in the table.

use std::fmt;

/// A system that runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum System {
    /// QEMU, nothing protected.
    Qemu,
    /// QEMU's COLO with colo-compare; x-checkpoint-delay in milliseconds.
    Colo(u32),
    /// QEMU's COLO checkpoints with filter-buffer in place of colo-compare.
    FilterBuffer,
    /// AX, nothing protected.
    AxNone,
    /// AX, disks mirrored; booted on the other host.
    AxHa,
    /// AX, fault tolerant.
    AxFt,
}

impl System {
    /// All of them, in the order of the table. 20,000 ms is QEMU's own default.
    pub const ALL: [System; 8] = [
        System::Qemu,
        System::Colo(100),
        System::Colo(1_000),
        System::Colo(20_000),
        System::FilterBuffer,
        System::AxNone,
        System::AxHa,
        System::AxFt,
    ];

    /// The system that runs the same guest by the same VMM without protection.
    pub fn baseline(self) -> System {
        match self {
            System::Qemu | System::Colo(_) | System::FilterBuffer => System::Qemu,
            System::AxNone | System::AxHa | System::AxFt => System::AxNone,
        }
    }

    /// Whether it is made of QEMU.
    pub fn is_qemu(self) -> bool {
        self.baseline() == System::Qemu
    }

    /// Whether `--only WORD` means it: its name, or the part of it before the dash.
    pub fn answers_to(self, word: &str) -> bool {
        let name = self.to_string();
        let group = match self {
            System::FilterBuffer => None,
            _ => name.split_once('-').map(|(group, _)| group),
        };
        name == word || group == Some(word)
    }

    /// Those that `--only` names, all without one. A word that names none is an error, with the names
    /// there are.
    pub fn chosen(only: &[String]) -> Result<Vec<System>, String> {
        if let Some(word) = only
            .iter()
            .find(|word| !System::ALL.iter().any(|s| s.answers_to(word)))
        {
            let names: Vec<String> = System::ALL.iter().map(System::to_string).collect();
            return Err(format!(
                "no system is called {word:?}; there are {}, and colo and ax for all of theirs",
                names.join(", ")
            ));
        }
        let chosen = |s: &System| only.is_empty() || only.iter().any(|word| s.answers_to(word));
        Ok(System::ALL.into_iter().filter(chosen).collect())
    }
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            System::Qemu => f.write_str("qemu"),
            System::Colo(delay) => write!(f, "colo-{delay}"),
            System::FilterBuffer => f.write_str("filter-buffer"),
            System::AxNone => f.write_str("ax-none"),
            System::AxHa => f.write_str("ax-ha"),
            System::AxFt => f.write_str("ax-ft"),
        }
    }
}

/// What the clients do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Case {
    /// No client.
    Idle,
    /// UDP echo of 64 bytes every millisecond, answered or not.
    UdpEcho,
    /// redis-benchmark GET, so many connections, one request at a time on each.
    Get(u32),
    /// redis-benchmark SET, the same.
    Set(u32),
    /// Appends to the ledger, each durable before it is answered, in a closed loop.
    Ledger,
    /// RESP GET in a closed loop while the guest writes so many pages a second.
    Dirty(u32),
    /// SIGKILL to every process of the host the guest runs on, under UDP echo and INCR.
    Failover,
}

impl Case {
    /// All of them, in the order they are run: the last leaves no guest.
    pub const ALL: [Case; 10] = [
        Case::Idle,
        Case::UdpEcho,
        Case::Get(1),
        Case::Get(50),
        Case::Set(50),
        Case::Ledger,
        Case::Dirty(1_000),
        Case::Dirty(10_000),
        Case::Dirty(50_000),
        Case::Failover,
    ];
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Case::Idle => f.write_str("idle"),
            Case::UdpEcho => f.write_str("udp-echo"),
            Case::Get(clients) => write!(f, "resp-get-{clients}"),
            Case::Set(clients) => write!(f, "resp-set-{clients}"),
            Case::Ledger => f.write_str("ledger-append"),
            Case::Dirty(rate) => write!(f, "dirty-{rate}"),
            Case::Failover => f.write_str("failover"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(only: &[&str]) -> Result<Vec<String>, String> {
        let only: Vec<String> = only.iter().map(ToString::to_string).collect();
        System::chosen(&only).map(|all| all.iter().map(System::to_string).collect())
    }

    #[test]
    fn systems_are_chosen_by_name_or_by_group() {
        let colo = ["qemu", "colo-100", "colo-1000", "colo-20000"];
        assert_eq!(names(&["colo", "qemu"]).unwrap(), colo);
        assert_eq!(names(&["ax-ft"]).unwrap(), ["ax-ft"]);
        assert_eq!(names(&["filter-buffer"]).unwrap(), ["filter-buffer"]);
        assert_eq!(names(&[]).unwrap().len(), System::ALL.len());
        let refused = names(&["ax", "xen"]).unwrap_err();
        assert!(
            refused.contains("\"xen\"") && refused.contains("filter-buffer"),
            "{refused}"
        );
        assert!(names(&["filter"]).is_err());
    }

    #[test]
    fn every_system_is_compared_with_its_own_vmm() {
        for system in System::ALL {
            assert_eq!(system.baseline().is_qemu(), system.is_qemu());
            assert_eq!(system.baseline().baseline(), system.baseline());
        }
    }
}
