//! The MQTT head: frames into calls on the hub, hub events into frames.
//!
//! [`machine`] is the protocol without I/O and [`event`] what it asks for, [`connection`] drives
//! one over a byte stream, [`listener`] accepts them on 8883. Between the two, each in a file of
//! its own: subscriptions (`filters`, `features`, `subscriber`), what the hub tells the client
//! (`outbox`, `outgoing`), what the client leaves behind (`will`), the stream (`transport`).

mod client;
pub mod connection;
mod end;
pub mod event;
mod features;
mod filters;
pub mod fuzz;
mod incoming;
pub mod limits;
pub mod listener;
pub mod machine;
mod outbox;
mod outgoing;
mod output;
mod strict;
mod subscriber;
mod transport;
mod will;

#[cfg(test)]
mod client_events_tests;
#[cfg(test)]
mod client_tests;
#[cfg(test)]
mod machine_delivery_tests;
#[cfg(test)]
mod machine_limit_tests;
#[cfg(test)]
mod machine_malformed_tests;
#[cfg(test)]
mod machine_model_tests;
#[cfg(test)]
mod machine_tests;
#[cfg(test)]
mod outbox_model_tests;
#[cfg(test)]
mod outbox_tests;
#[cfg(test)]
mod services_tests;
#[cfg(test)]
#[cfg(feature = "faults")]
mod subscriber_tests;
#[cfg(test)]
mod test_head;
#[cfg(test)]
mod test_packets;
#[cfg(test)]
mod vector_tests;
