//! The MQTT head: frames into calls on the hub, hub events into frames.
//!
//! [`machine`] is the protocol without I/O and [`event`] what it asks for, [`connection`] drives
//! one over a byte stream, [`listener`] accepts them on 8883.

pub mod connection;
pub mod event;
pub mod limits;
pub mod listener;
pub mod machine;
mod strict;

#[cfg(test)]
mod machine_limit_tests;
#[cfg(test)]
mod machine_model_tests;
#[cfg(test)]
mod machine_tests;
#[cfg(test)]
mod test_packets;
