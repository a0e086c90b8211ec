//! The client of the scope API: our copy of the hierarchy and how it is kept current.
//!
//! [`ScopeConfig`] says how often; the keeper walks and restores, the refresh asks for one
//! identity. What the copy decides is the auth crate's matter.
//!
//! Spec: auth-hierarchy-http.md 4 and 6, upstream.md A9, design.md D12.

mod api;
mod http;
mod keeper;
mod records;
mod refresh;
#[cfg(test)]
mod test_support;
mod walk;

pub(crate) use api::HttpScopeApi;
pub use api::ScopeError;
pub(crate) use http::HttpClient;
pub use http::HttpError;
pub use keeper::ScopeConfig;
pub(crate) use keeper::ScopeKeeper;
pub(crate) use refresh::ScopeRefresh;
