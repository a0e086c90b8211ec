//! The identity registry: devices, modules, parents, keys (spec/upstream.md B6).
//!
//! It lives in memory. A restarted emulator has what the seed file says, with the same generation
//! ids and scopes, so that a restart looks like the same hub; what a test changed over REST is
//! gone.

pub(crate) mod bulk;
mod devices;
pub(crate) mod json;
mod model;
pub(crate) mod seed;

pub(crate) use devices::{Devices, RegistryError};
pub(crate) use model::{Authentication, Device, Module, new_edge_module};
