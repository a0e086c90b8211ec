//! Starts whole hierarchies on this machine and breaks them on purpose.
//!
//! A [`Lab`] is one IoT Hub emulator and any number of edgeHubs, each a child process on its own
//! loopback address with real certificates, real ports and real host names. Between them stands a
//! [`relay`], which owns every public address and can therefore cut, black-hole, refuse, reset or
//! delay what one host says to another, without root and without touching the processes. Hosts can
//! be killed, paused, stopped and started again; at the end everything that the lab started is
//! ended by its process id.
//!
//! It is *not* a client of the hub: it knows the binaries `edgehub` and `iothub-emulator` only from
//! their environment variables, command lines and sockets, and depends on none of their crates.
//!
//! Start reading at [`LabBuilder`] (what a lab consists of) and [`Lab`] (what can be done to it).
//! [`verdict`] decides whether anything acknowledged was lost. The binary `edgehub-lab`
//! (`scripts/lab.sh`, `scripts/demo.sh`) is a thin shell around this library; its contract is
//! [`lab_json`].
//!
//! # Invariants
//! - A child process never outlives the lab, also when the lab itself is killed with SIGKILL
//!   ([`process::Reaper`]).
//! - Two labs never share an address, a port or a host name ([`network::NetworkLease`]).
//! - The binaries that run are exactly those that cargo reported after bringing them up to date
//!   ([`Binaries`]).

#![allow(
    clippy::disallowed_methods,
    reason = "the lab waits for real processes on the real clock; there is no virtual time here"
)]

pub mod binaries;
mod builder;
pub mod connection_string;
pub mod control;
pub mod demo;
mod environment;
pub mod hosts_file;
mod http;
mod lab;
pub mod lab_json;
pub mod ledger;
pub mod metrics;
pub mod mqtt_sender;
pub mod network;
pub mod pki;
pub mod process;
mod process_group;
pub mod relay;
pub mod sas;
pub mod seed;
pub mod sender_log;
mod state_dir;
pub mod topology;
pub mod verdict;

pub use binaries::{Binaries, Profile};
pub use builder::LabBuilder;
pub use connection_string::ConnectionString;
pub use lab::{Host, Lab};
pub use lab_json::Identity;
pub use sender_log::{Acknowledged, SenderLog};
pub use topology::{AtStart, DeviceSpec, EdgeSpec, LeafSpec, ModuleSpec, StorageSync};
pub use verdict::Verdict;

/// The name of the IoT Hub emulator among the hosts of a lab.
pub const HUB: &str = "hub";
