//! The devices seen from outside: by a driver in guest memory, and by those who hold the ports.

mod dirty;
mod disk;
mod hostile;
mod net;
mod offload;
mod persist;
mod quiet;
mod rig;
mod serial;
mod transport;
