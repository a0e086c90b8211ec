//! Who may: tokens, audiences, policies and auth chains (spec/upstream.md B3).
//!
//! X.509 is not offered, and a token of `$edgeHub` without a chain speaks for nobody else.

use crate::hub::{Hub, Mode};
use crate::identity::{AuthChain, EDGE_HUB, Identity};
use crate::limits::EDGE_LEVELS_MAX;
use crate::registry::{Authentication, Device, Devices};
use crate::sas::{SasError, SasToken};

/// Why a caller is refused. Each is a definite no.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the acting device {0} is no edge device")]
    ActorNotEdge(String),
    #[error("the token is for {0:?}")]
    Audience(String),
    #[error("the auth chain is for {0}, not for the connecting identity")]
    ChainTarget(Identity),
    #[error("{0} is disabled")]
    Disabled(String),
    #[error("the token has expired")]
    Expired,
    #[error("no key of {0} signed the token")]
    Key(String),
    #[error("the auth chain has a module above its target: {0}")]
    ModuleAbove(Identity),
    #[error("no token for {0} came before its link")]
    NoToken(Identity),
    #[error("{child} is not a child of {parent}")]
    NotAdjacent { child: Identity, parent: Identity },
    #[error("the policy {0:?} is unknown or lacks the permission")]
    Policy(String),
    #[error("the token is malformed: {0}")]
    Token(#[from] SasError),
    #[error("more than {EDGE_LEVELS_MAX} edge devices in the auth chain")]
    TooDeep,
    #[error("{0} is not registered")]
    Unknown(Identity),
}

/// What a shared access policy may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Permission {
    DeviceConnect,
    RegistryRead,
    RegistryWrite,
    /// Twins, methods and messages, from the service side.
    ServiceConnect,
}

/// Who a connection says it is: an identity, alone or through a chain that starts with it.
#[derive(Debug, Clone)]
pub(crate) struct Claim {
    pub(crate) identity: Identity,
    pub(crate) chain: Option<AuthChain>,
}

/// Whose key signed a token.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Signer {
    Identity(Identity),
    /// A shared access policy.
    Policy(String),
}

impl Claim {
    /// Whose token the claim needs: the identity's own, or that of the hub of the edge device that
    /// acts for it.
    pub(crate) fn signer(&self) -> Identity {
        match self.actor() {
            Some(actor) => Identity {
                device: actor.device.clone(),
                module: Some(EDGE_HUB.to_owned()),
            },
            None => self.identity.clone(),
        }
    }

    /// The edge device that acts for the identity.
    pub(crate) fn actor(&self) -> Option<&Identity> {
        self.chain.as_ref().and_then(AuthChain::actor)
    }
}

/// Verifies a device connection. Returns when its token ends, milliseconds since 1970.
pub(crate) fn connect(hub: &Hub, claim: &Claim, credential: &str) -> Result<u64, Refusal> {
    let devices = hub.devices();
    check_membership(&devices, claim, hub.mode)?;
    let token = SasToken::parse(credential)?;
    let signer = claim.signer();
    if claim.actor().is_none() && token.policy.is_some() {
        check_policy(hub, &token, Permission::DeviceConnect, &path_of(&signer))?;
    } else {
        check_own_token(hub, &devices, &token, &signer)?;
    }
    Ok(token.expires_at_ms)
}

/// Verifies a token by itself: who signed it, and when it ends. What it is good for is asked later.
pub(crate) fn token(hub: &Hub, credential: &str) -> Result<(Signer, u64), Refusal> {
    let token = SasToken::parse(credential)?;
    let signer = match &token.policy {
        Some(name) => {
            let policy = hub.policies.iter().find(|policy| policy.name == *name);
            let policy = policy.ok_or_else(|| Refusal::Policy(name.clone()))?;
            if !token.is_signed_with(&policy.key) {
                return Err(Refusal::Key(name.clone()));
            }
            check_life(hub, &token)?;
            Signer::Policy(name.clone())
        }
        None => {
            let devices = hub.devices();
            let audiences = token.audiences();
            let identities = audiences.iter().filter_map(|audience| named_by(audience));
            let identities: Vec<Identity> = identities.collect();
            // Ids may look encoded: the first reading that the registry knows is meant.
            let known = identities
                .iter()
                .find(|identity| devices.contains(identity));
            let identity = known.or_else(|| identities.first()).ok_or_else(|| {
                let audience = audiences.first().map(|audience| audience.join("/"));
                Refusal::Audience(audience.unwrap_or_default())
            })?;
            check_alive(&devices, identity)?;
            check_own_token(hub, &devices, &token, identity)?;
            Signer::Identity(identity.clone())
        }
    };
    Ok((signer, token.expires_at_ms))
}

/// The device or module of an audience.
fn named_by(audience: &[String]) -> Option<Identity> {
    let audience: Vec<&str> = audience.iter().map(String::as_str).collect();
    match *audience.as_slice() {
        [_, "devices", device] => Identity::new(device, None).ok(),
        [_, "devices", device, "modules", module] => Identity::new(device, Some(module)).ok(),
        _ => None,
    }
}

/// Everything about a claim except its token: what must stay true while the connection lives.
pub(crate) fn check_membership(
    devices: &Devices,
    claim: &Claim,
    mode: Mode,
) -> Result<(), Refusal> {
    check_alive(devices, &claim.identity)?;
    let Some(chain) = &claim.chain else {
        return Ok(());
    };
    if chain.target() != &claim.identity {
        return Err(Refusal::ChainTarget(chain.target().clone()));
    }
    check_chain(devices, chain, mode)
}

/// Verifies that a chain is one: every neighbour is a child of the next, all are alive, and an
/// edge device acts. In lenient mode the neighbours are not compared.
pub(crate) fn check_chain(devices: &Devices, chain: &AuthChain, mode: Mode) -> Result<(), Refusal> {
    let mut edges = 0;
    for element in chain.elements() {
        let device = check_alive(devices, element)?;
        edges += usize::from(device.iot_edge && element.module.is_none());
    }
    if edges > EDGE_LEVELS_MAX {
        return Err(Refusal::TooDeep);
    }
    for (child, parent) in chain.elements().zip(chain.elements().skip(1)) {
        if parent.module.is_some() {
            return Err(Refusal::ModuleAbove(parent.clone()));
        }
        if mode.is_strict() && !is_child(devices, child, parent) {
            return Err(Refusal::NotAdjacent {
                child: child.clone(),
                parent: parent.clone(),
            });
        }
    }
    match chain.actor() {
        Some(actor)
            if !devices
                .get(&actor.device)
                .is_some_and(|device| device.iot_edge) =>
        {
            Err(Refusal::ActorNotEdge(actor.device.clone()))
        }
        _ => Ok(()),
    }
}

/// Verifies an HTTPS call of `{actor}/$edgeHub`.
pub(crate) fn edge_hub_call(hub: &Hub, actor: &str, credential: &str) -> Result<(), Refusal> {
    let signer = Identity {
        device: actor.to_owned(),
        module: Some(EDGE_HUB.to_owned()),
    };
    let devices = hub.devices();
    let device = check_alive(&devices, &signer)?;
    if !device.iot_edge {
        return Err(Refusal::ActorNotEdge(device.id.clone()));
    }
    check_own_token(hub, &devices, &SasToken::parse(credential)?, &signer)
}

/// Verifies a registry call: a policy, or the device itself for its own modules.
pub(crate) fn registry_call(
    hub: &Hub,
    permission: Permission,
    path: &[&str],
    own_device: Option<&str>,
    credential: &str,
) -> Result<(), Refusal> {
    let token = SasToken::parse(credential)?;
    if let (None, Some(device)) = (&token.policy, own_device) {
        let device = Identity {
            device: device.to_owned(),
            module: None,
        };
        let devices = hub.devices();
        check_alive(&devices, &device)?;
        return check_own_token(hub, &devices, &token, &device);
    }
    check_policy(hub, &token, permission, path)
}

/// Verifies a call of the service side: a policy.
pub(crate) fn service_call(
    hub: &Hub,
    permission: Permission,
    path: &[&str],
    credential: &str,
) -> Result<(), Refusal> {
    check_policy(hub, &SasToken::parse(credential)?, permission, path)
}

/// Whether `child` stands right below `parent`: a module below its device, a device below the
/// edge device whose scope it names.
fn is_child(devices: &Devices, child: &Identity, parent: &Identity) -> bool {
    if child.module.is_some() {
        return child.device == parent.device;
    }
    let above = devices
        .get(&child.device)
        .and_then(|device| devices.parent(device));
    above.is_some_and(|above| above.id == parent.device)
}

fn check_alive<'a>(devices: &'a Devices, identity: &Identity) -> Result<&'a Device, Refusal> {
    let unknown = || Refusal::Unknown(identity.clone());
    let device = devices.get(&identity.device).ok_or_else(unknown)?;
    if identity
        .module
        .as_ref()
        .is_some_and(|module| !device.modules.contains_key(module))
    {
        return Err(unknown());
    }
    if !device.enabled {
        return Err(Refusal::Disabled(device.id.clone()));
    }
    Ok(device)
}

/// A token signed with the identity's own key, for exactly this identity.
fn check_own_token(
    hub: &Hub,
    devices: &Devices,
    token: &SasToken,
    signer: &Identity,
) -> Result<(), Refusal> {
    if let Some(policy) = &token.policy {
        return Err(Refusal::Policy(policy.clone()));
    }
    let authentication = authentication_of(devices, signer)?;
    if !authentication.keys().any(|key| token.is_signed_with(key)) {
        return Err(Refusal::Key(signer.to_string()));
    }
    let path = path_of(signer);
    let fits = |audience: &[String]| audience.len() == path.len() + 1;
    check_audience(hub, token, &path, fits)?;
    check_life(hub, token)
}

/// A token signed with a shared access policy's key, for the host or a prefix of the path.
fn check_policy(
    hub: &Hub,
    token: &SasToken,
    permission: Permission,
    path: &[&str],
) -> Result<(), Refusal> {
    let name = token.policy.clone().unwrap_or_default();
    let allowed = match name.as_str() {
        "iothubowner" => true,
        "device" => permission == Permission::DeviceConnect,
        "registryRead" => permission == Permission::RegistryRead,
        "registryReadWrite" => {
            matches!(
                permission,
                Permission::RegistryRead | Permission::RegistryWrite
            )
        }
        "service" => permission == Permission::ServiceConnect,
        _ => false,
    };
    let policy = hub
        .policies
        .iter()
        .find(|policy| allowed && policy.name == name);
    let policy = policy.ok_or_else(|| Refusal::Policy(name.clone()))?;
    if !token.is_signed_with(&policy.key) {
        return Err(Refusal::Key(name));
    }
    check_audience(hub, token, path, |_| true)?;
    check_life(hub, token)
}

/// Compares the audience, in one of its decodings, with the host and the path below it. In strict
/// mode the host must be this hub and ids are exact.
fn check_audience(
    hub: &Hub,
    token: &SasToken,
    path: &[&str],
    fits: impl Fn(&[String]) -> bool,
) -> Result<(), Refusal> {
    let strict = hub.mode.is_strict();
    let same = |wanted: &str, got: &str| {
        if strict {
            wanted == got
        } else {
            wanted.eq_ignore_ascii_case(got)
        }
    };
    let audiences = token.audiences();
    let found = audiences.iter().any(|audience| {
        // Event Hubs clients name their resource by URL.
        let audience = match audience.as_slice() {
            [scheme, empty, rest @ ..] if scheme == "sb:" && empty.is_empty() => rest,
            audience => audience,
        };
        let Some((host, ids)) = audience.split_first() else {
            return false;
        };
        (!strict || host.eq_ignore_ascii_case(&hub.hostname))
            && fits(audience)
            && ids.len() <= path.len()
            && ids.iter().zip(path).all(|(got, wanted)| same(wanted, got))
    });
    if found {
        return Ok(());
    }
    Err(Refusal::Audience(
        audiences
            .first()
            .map(|audience| audience.join("/"))
            .unwrap_or_default(),
    ))
}

fn check_life(hub: &Hub, token: &SasToken) -> Result<(), Refusal> {
    if token.expires_at_ms > hub.clock.now_ms() {
        Ok(())
    } else {
        Err(Refusal::Expired)
    }
}

fn authentication_of<'a>(
    devices: &'a Devices,
    identity: &Identity,
) -> Result<&'a Authentication, Refusal> {
    let device = devices.get(&identity.device);
    let found = match &identity.module {
        None => device.map(|device| &device.authentication),
        Some(module) => device
            .and_then(|device| device.modules.get(module))
            .map(|module| &module.authentication),
    };
    found.ok_or_else(|| Refusal::Unknown(identity.clone()))
}

fn path_of(identity: &Identity) -> Vec<&str> {
    let mut path = vec!["devices", identity.device.as_str()];
    if let Some(module) = &identity.module {
        path.extend(["modules", module]);
    }
    path
}
