//! The control protocol: one command per line, one reply line per command.

/// Most bytes in a command line.
pub const MAX_LINE: usize = 512;

/// What the guest does when its power button is pressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Button {
    /// It does not listen to it.
    Unheard,
    /// Records what it has been asked to, then the word `button` in the ledger, and switches itself off.
    Poweroff,
    /// Acknowledges the press and goes on.
    Ignore,
    /// Resets itself.
    Reboot,
}

impl Button {
    /// Reads its name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let is = |word: &str| name.eq_ignore_ascii_case(word);
        match () {
            () if is("unheard") => Some(Self::Unheard),
            () if is("poweroff") => Some(Self::Poweroff),
            () if is("ignore") => Some(Self::Ignore),
            () if is("reboot") => Some(Self::Reboot),
            () => None,
        }
    }
}

/// A command of TCP 7001 or of the console. Words are not case-sensitive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command<'a> {
    /// `PING`
    Ping,
    /// `HELP`
    Help,
    /// `DIRTY <pages> <per-second> <bytes-per-page>`: keep writing, `per_second` page writes a
    /// second, over a working set of `pages` pages. Zero pages or writes stop it.
    Dirty {
        /// Working set, in pages of 4096 bytes.
        pages: u64,
        /// Page writes per second.
        per_second: u64,
        /// Bytes changed per page write, 8 to 4096.
        bytes: u64,
    },
    /// `SPIN on|off`: keep every CPU (beyond the first, where there are more) busy.
    Spin(bool),
    /// `CLOCK`
    Clock,
    /// `HASH [start_page n_pages]`: digest of arena pages; without a range, of the part
    /// that `WORK` writes.
    Hash(Option<(u64, u64)>),
    /// `DISKHASH [dev]`
    DiskHash(u64),
    /// `WORK <seed> <steps>`
    Work {
        /// Seed of the sequence.
        seed: u64,
        /// Steps to do.
        steps: u64,
    },
    /// `WORKSTATUS`
    WorkStatus,
    /// `COUNTERS`
    Counters,
    /// `CRASH`
    Crash,
    /// `OUTSB <n>`: `rep outsb` of n numbered bytes to port 0x510, at most 4096.
    Outsb(u64),
    /// `COUNT <n>`: n numbered lines on the console.
    Count(u64),
    /// `ECHO <text>`
    Echo(&'a str),
    /// `BUTTON unheard|poweroff|ignore|reboot`
    Button(Button),
    /// `POWEROFF`
    Poweroff,
    /// `REBOOT`
    Reboot,
}

/// Why a line is no command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadCommand {
    /// No such command.
    Unknown,
    /// A known command whose arguments do not fit; the text is how it is used.
    Usage(&'static str),
}

impl<'a> Command<'a> {
    /// Reads one line, without its end.
    ///
    /// # Errors
    /// [`BadCommand`] says whether the word or its arguments are at fault.
    pub fn parse(line: &'a str) -> Result<Self, BadCommand> {
        let line = line.trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let mut args = rest.split_ascii_whitespace();
        let is = |name: &str| word.eq_ignore_ascii_case(name);
        let command = if is("ping") {
            Self::Ping
        } else if is("help") {
            Self::Help
        } else if is("echo") {
            return Ok(Self::Echo(rest.trim_start()));
        } else if is("dirty") {
            let usage = BadCommand::Usage("DIRTY <pages> <per-second> <bytes-per-page>");
            let pages = number(args.next()).ok_or(usage)?;
            match args.next() {
                None if pages == 0 => Self::Dirty {
                    pages,
                    per_second: 0,
                    bytes: 8,
                },
                second => Self::Dirty {
                    pages,
                    per_second: number(second).ok_or(usage)?,
                    bytes: match args.next() {
                        None => 8,
                        third => number(third)
                            .filter(|b| (1..=4096).contains(b))
                            .ok_or(usage)?,
                    },
                },
            }
        } else if is("spin") {
            match args.next() {
                Some(s) if s.eq_ignore_ascii_case("on") => Self::Spin(true),
                Some(s) if s.eq_ignore_ascii_case("off") => Self::Spin(false),
                _ => return Err(BadCommand::Usage("SPIN on|off")),
            }
        } else if is("clock") {
            Self::Clock
        } else if is("hash") {
            match args.next() {
                None => Self::Hash(None),
                start => {
                    let usage = BadCommand::Usage("HASH [start_page n_pages]");
                    let start = number(start).ok_or(usage)?;
                    Self::Hash(Some((start, number(args.next()).ok_or(usage)?)))
                }
            }
        } else if is("diskhash") {
            match args.next() {
                None => Self::DiskHash(0),
                dev => Self::DiskHash(number(dev).ok_or(BadCommand::Usage("DISKHASH [dev]"))?),
            }
        } else if is("work") {
            let usage = BadCommand::Usage("WORK <seed> <steps>");
            let seed = number(args.next()).ok_or(usage)?;
            Self::Work {
                seed,
                steps: number(args.next()).ok_or(usage)?,
            }
        } else if is("workstatus") {
            Self::WorkStatus
        } else if is("counters") {
            Self::Counters
        } else if is("crash") {
            Self::Crash
        } else if is("outsb") {
            let n = number(args.next()).filter(|n| *n <= 4096);
            Self::Outsb(n.ok_or(BadCommand::Usage("OUTSB <n>, n at most 4096"))?)
        } else if is("count") {
            Self::Count(number(args.next()).ok_or(BadCommand::Usage("COUNT <n>"))?)
        } else if is("button") {
            let button = args.next().and_then(Button::parse);
            let usage = BadCommand::Usage("BUTTON unheard|poweroff|ignore|reboot");
            Self::Button(button.ok_or(usage)?)
        } else if is("poweroff") {
            Self::Poweroff
        } else if is("reboot") {
            Self::Reboot
        } else {
            return Err(BadCommand::Unknown);
        };
        match args.next() {
            None => Ok(command),
            Some(_) => Err(BadCommand::Usage("fewer arguments")),
        }
    }
}

fn number(word: Option<&str>) -> Option<u64> {
    word?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_commands() {
        assert_eq!(
            Command::parse(" dirty 100 2000 64\r"),
            Ok(Command::Dirty {
                pages: 100,
                per_second: 2000,
                bytes: 64
            })
        );
        assert_eq!(
            Command::parse("DIRTY 0"),
            Ok(Command::Dirty {
                pages: 0,
                per_second: 0,
                bytes: 8
            })
        );
        assert_eq!(Command::parse("spin ON"), Ok(Command::Spin(true)));
        assert_eq!(Command::parse("HASH"), Ok(Command::Hash(None)));
        assert_eq!(Command::parse("HASH 3 9"), Ok(Command::Hash(Some((3, 9)))));
        assert_eq!(Command::parse("diskhash"), Ok(Command::DiskHash(0)));
        assert_eq!(
            Command::parse("WORK 7 100"),
            Ok(Command::Work {
                seed: 7,
                steps: 100
            })
        );
        assert_eq!(Command::parse("echo a  b c"), Ok(Command::Echo("a  b c")));
        assert_eq!(Command::parse("OUTSB 4096"), Ok(Command::Outsb(4096)));
        for (line, button) in [
            ("button poweroff", Button::Poweroff),
            ("BUTTON Ignore", Button::Ignore),
            ("BUTTON reboot", Button::Reboot),
            ("BUTTON unheard", Button::Unheard),
        ] {
            assert_eq!(Command::parse(line), Ok(Command::Button(button)));
        }
    }

    #[test]
    fn refuses_the_rest() {
        assert_eq!(Command::parse("FORMAT c"), Err(BadCommand::Unknown));
        assert_eq!(Command::parse(""), Err(BadCommand::Unknown));
        for bad in [
            "DIRTY x",
            "DIRTY 1",
            "DIRTY 1 2 0",
            "DIRTY 1 2 4097",
            "HASH 1",
            "WORK 1",
        ]
        .into_iter()
        .chain(["OUTSB 4097", "SPIN", "COUNT -1", "CLOCK now", "DISKHASH a"])
        .chain(["BUTTON", "BUTTON on", "BUTTON ignore it"])
        {
            assert!(
                matches!(Command::parse(bad), Err(BadCommand::Usage(_))),
                "{bad}"
            );
        }
    }
}
