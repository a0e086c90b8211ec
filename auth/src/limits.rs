//! Every limit and period of this crate, in one place.
//!
//! Where a value comes from the reference its section of `spec/auth-hierarchy-http.md` is named.

use std::time::Duration;

/// Edge devices in one chain, our own included (4.2). An edge device deeper than that has no
/// chain; leaves and modules may hang below the deepest one.
pub const EDGE_DEVICES_PER_CHAIN_MAX: usize = 5;

/// Identities that one scope tree holds. Far above what a hierarchy has (100 children per edge
/// device, [`EDGE_DEVICES_PER_CHAIN_MAX`] levels, 50 modules per device), and low enough that a
/// mad upstream cannot fill the memory: about 1 KiB each.
pub const SCOPE_IDENTITIES_MAX: usize = 100_000;

/// Clock skew that a token's expiry tolerates, in milliseconds (2.4). Also the time that a
/// connection outlives the `se` of its token.
pub const TOKEN_SKEW_MS: u64 = 5 * 60 * 1000;

/// Lifetime of the tokens that we sign ourselves, in milliseconds (2.6).
pub const OWN_TOKEN_TTL_MS: u64 = 60 * 60 * 1000;

/// Our own token is replaced once it has this much life left or less, in milliseconds (2.6).
pub const OWN_TOKEN_RENEW_BEFORE_MS: u64 = 30 * 60 * 1000;

/// Longest time that one authentication waits for upstream, over all that it asks (D12, 13 #7).
pub const REFRESH_WAIT: Duration = Duration::from_secs(10);

/// Identities that one authentication may ask upstream about: the acting hub and the target, or
/// a module and its device. Each of them is asked about at most once.
pub const REFRESHES_PER_ATTEMPT_MAX: usize = 2;

/// Page size of a scope answer when the caller names none or a useless one.
pub const SCOPE_PAGE_SIZE_DEFAULT: usize = 100;

/// Largest page size that a scope answer honours (13 #9); about 1 MiB of JSON.
pub const SCOPE_PAGE_SIZE_MAX: usize = 1000;
