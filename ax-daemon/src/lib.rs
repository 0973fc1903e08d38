//! axd: one per host, the control plane of AX.
//!
//! It keeps the definitions of VMs, starts and watches their processes, and talks with axvm and with
//! the other host's axd. It is not on any guest's path: guests are `ax-vmm` processes of their
//! own, with their own connections to each other and to the arbiter, and go on when axd is killed,
//! stopped or upgraded. The next axd finds them again.
//!
//! ```text
//!   axvm --unix socket--> server -> daemon -> start / ops -> process --control socket--> ax-vmm
//!                                     |                        ^
//!                                     v                        | spawned, watched (supervise)
//!              other axd <--link--> peer / server           ax-vmm
//! ```
//!
//! - [`config`]: `axd.toml`. [`define`], [`store`]: definitions, kept the same on both hosts by [`sync`].
//! - [`process`], [`control`]: one `ax-vmm`, and how to talk to it. [`supervise`]: its events, its end,
//!   and finding it again. [`journal`], [`images`]: what a start leaves on disk.
//! - [`daemon`]: what an axd holds, and the way of a request. [`start`] and [`shadow`]: all or
//!   nothing, on this host and the other. [`again`]: a shadow for a guest that lost its own;
//!   [`home`]: back to the host it prefers.
//!   [`mode`]: another protection for one that runs. [`ha`]: restarted
//!   here, and room for those of the other host. [`stop`]: the guest is asked first. [`ops`]: the rest.
//!   [`console`], [`events`], [`epochs`], [`autostart`]. [`maintenance`]: the hosts, and one out of service; [`drain`]: one about to be shut down. [`word`]: what this host says of a pair's record.
//! - [`server`], [`peer`]: where requests come in, and go out to the other host.
//! - [`run`], [`pair`], [`witness`], [`selfcheck`]: the program's subcommands.

pub mod again;
pub mod autostart;
pub mod config;
pub mod console;
pub mod control;
pub mod daemon;
pub mod define;
pub mod drain;
pub mod epochs;
pub mod events;
pub mod failure;
pub mod ha;
pub mod home;
pub mod images;
pub mod journal;
pub mod maintenance;
pub mod mode;
pub mod ops;
pub mod pair;
pub mod partner;
pub mod paths;
pub mod peer;
pub mod process;
pub mod replace;
pub mod run;
pub mod selfcheck;
pub mod server;
pub mod shadow;
pub mod start;
pub mod stop;
pub mod store;
pub mod supervise;
pub mod sync;
pub mod witness;
pub mod word;
