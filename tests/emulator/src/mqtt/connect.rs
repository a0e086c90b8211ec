//! From a CONNECT to an admitted session, or to a CONNACK code that says why not.

use mqttbytes::v4::{Connect, ConnectReturnCode};

use super::session::Session;
use super::user_name::{UserName, UserNameError};
use crate::api_version::is_api_version;
use crate::authorize::{self, Claim, Refusal};
use crate::faults::FaultKind;
use crate::hub::Hub;
use crate::identity::Identity;
use crate::sas::SasToken;

/// Why a CONNECT is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("the api-version is missing or malformed")]
    ApiVersion,
    #[error("the client id {0:?} is not the user name's identity")]
    ClientId(String),
    #[error("made to fail through the control API")]
    Fault(u16),
    #[error("the user name names the host {0:?}")]
    Host(String),
    #[error(transparent)]
    Refusal(#[from] Refusal),
    #[error(transparent)]
    UserName(#[from] UserNameError),
    #[error("the will's topic {0:?} is not the identity's")]
    Will(String),
}

impl ConnectError {
    /// spec/upstream.md B3, "Failures".
    pub(crate) fn code(&self) -> ConnectReturnCode {
        match self {
            Self::ApiVersion | Self::UserName(_) => ConnectReturnCode::BadUserNamePassword,
            Self::ClientId(_) => ConnectReturnCode::BadClientId,
            Self::Fault(1) => ConnectReturnCode::RefusedProtocolVersion,
            Self::Fault(2) => ConnectReturnCode::BadClientId,
            Self::Fault(4) => ConnectReturnCode::BadUserNamePassword,
            Self::Fault(5) => ConnectReturnCode::NotAuthorized,
            Self::Fault(_) => ConnectReturnCode::ServiceUnavailable,
            Self::Host(_) | Self::Refusal(_) | Self::Will(_) => ConnectReturnCode::NotAuthorized,
        }
    }
}

/// An admitted connection.
pub(crate) struct Admitted {
    pub(crate) session: Session,
    pub(crate) claim: Claim,
    pub(crate) expires_at_ms: u64,
}

/// Judges a CONNECT. The registry, the policies and the clock are read once, here.
pub(crate) fn admit(hub: &Hub, connect: &Connect) -> Result<Admitted, ConnectError> {
    let who = Identity::parse(&connect.client_id).ok();
    if let Some(failure) = hub.faults.take(FaultKind::Connect, who.as_ref()) {
        return Err(ConnectError::Fault(failure.code));
    }
    let (user_name, password) = match &connect.login {
        Some(login) => (login.username.as_str(), login.password.as_str()),
        None => ("", ""),
    };
    let user_name = UserName::parse(user_name)?;
    if connect.client_id != user_name.identity.to_string() {
        return Err(ConnectError::ClientId(connect.client_id.clone()));
    }
    if hub.mode.is_strict() {
        if !user_name.api_version.as_deref().is_some_and(is_api_version) {
            return Err(ConnectError::ApiVersion);
        }
        if !user_name.host.eq_ignore_ascii_case(&hub.hostname) {
            return Err(ConnectError::Host(user_name.host));
        }
    }
    let claim = Claim {
        identity: user_name.identity,
        chain: user_name.auth_chain,
    };
    let expires_at_ms = authorize::connect(hub, &claim, password)?;
    let by_policy = SasToken::parse(password).is_ok_and(|token| token.policy.is_some());
    let stamps = hub.stamps(&claim.identity, user_name.model_id.as_deref(), by_policy)?;
    let session = Session::new(claim.identity.clone(), stamps, hub.mode);
    if let Some(will) = &connect.last_will
        && session
            .read_telemetry(&will.topic, &will.message, will.retain)
            .is_err()
    {
        return Err(ConnectError::Will(will.topic.clone()));
    }
    Ok(Admitted {
        session,
        claim,
        expires_at_ms,
    })
}
