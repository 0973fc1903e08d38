//! Since which wire version each request exists.

use ax_wire::Version;
use ax_wire::version::Since;

use super::{PeerRequest, Request};

impl Since for PeerRequest {
    fn since(&self) -> Version {
        match self {
            PeerRequest::Hello { .. }
            | PeerRequest::Sync { .. }
            | PeerRequest::Processes
            | PeerRequest::SpawnShadow { .. }
            | PeerRequest::Undo { .. }
            | PeerRequest::Settle { .. }
            | PeerRequest::Stopped { .. }
            | PeerRequest::Fence { .. }
            | PeerRequest::Word { .. } => Version::FIRST,
            PeerRequest::Forward { request } => request.since(),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            PeerRequest::Hello { .. } => "hello",
            PeerRequest::Sync { .. } => "sync",
            PeerRequest::Processes => "processes",
            PeerRequest::SpawnShadow { .. } => "spawn shadow",
            PeerRequest::Undo { .. } => "undo",
            PeerRequest::Settle { .. } => "settle",
            PeerRequest::Stopped { .. } => "stopped",
            PeerRequest::Fence { .. } => "fence",
            PeerRequest::Word { .. } => "word",
            PeerRequest::Forward { request } => request.name(),
        }
    }
}

impl Since for Request {
    fn since(&self) -> Version {
        match self {
            Request::Version
            | Request::Define { .. }
            | Request::Undefine { .. }
            | Request::Autostart { .. }
            | Request::Prefer { .. }
            | Request::Start { .. }
            | Request::Stop { .. }
            | Request::Reboot { .. }
            | Request::Pause { .. }
            | Request::Resume { .. }
            | Request::List
            | Request::Show { .. }
            | Request::Console { .. }
            | Request::Failover { .. }
            | Request::SetMode { .. }
            | Request::Hosts
            | Request::Maintenance { .. }
            | Request::Drain { .. }
            | Request::Kill { .. }
            | Request::Events { .. } => Version::FIRST,
            Request::Trace { .. } | Request::Stats { .. } => Version::SECOND,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Request::Version => "version",
            Request::Define { .. } => "define",
            Request::Undefine { .. } => "undefine",
            Request::Autostart { .. } => "autostart",
            Request::Prefer { .. } => "prefer",
            Request::Start { .. } => "start",
            Request::Stop { .. } => "stop",
            Request::Reboot { .. } => "reboot",
            Request::Pause { .. } => "pause",
            Request::Resume { .. } => "resume",
            Request::List => "list",
            Request::Show { .. } => "show",
            Request::Console { .. } => "console",
            Request::Failover { .. } => "failover",
            Request::SetMode { .. } => "set-mode",
            Request::Hosts => "hosts",
            Request::Maintenance { .. } => "maintenance",
            Request::Drain { .. } => "drain",
            Request::Kill { .. } => "kill",
            Request::Events { .. } => "events",
            Request::Trace { .. } => "trace",
            Request::Stats { .. } => "stats",
        }
    }
}
