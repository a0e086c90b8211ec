//! The registry's rules.

use super::*;

fn spec(id: &str, iot_edge: bool, parent_scope: Option<String>) -> DeviceSpec {
    DeviceSpec {
        id: id.to_owned(),
        iot_edge,
        enabled: true,
        status_reason: None,
        authentication: Authentication::None,
        parent_scope,
    }
}

fn scope(devices: &Devices, id: &str) -> Option<String> {
    devices.get(id).unwrap().device_scope.clone()
}

#[test]
fn an_edge_device_gets_a_scope_and_its_system_modules() {
    let mut devices = Devices::default();
    devices
        .create(spec("edge1", true, None), 1_767_225_600_000)
        .unwrap();
    let edge = devices.get("edge1").unwrap();
    assert_eq!(
        edge.device_scope.as_deref(),
        Some("ms-azure-iot-edge://edge1-639028224000000000")
    );
    assert_eq!(
        edge.modules.keys().collect::<Vec<_>>(),
        ["$edgeAgent", "$edgeHub"]
    );
    assert_eq!(edge.modules["$edgeHub"].authentication.keys().count(), 2);
    assert_eq!(
        devices.create(spec("edge1", true, None), 0),
        Err(RegistryError::DeviceExists("edge1".to_owned()))
    );
}

#[test]
fn children_follow_their_parent() {
    let mut devices = Devices::default();
    devices.create(spec("edge1", true, None), 0).unwrap();
    devices
        .create(spec("edge2", true, scope(&devices, "edge1")), 0)
        .unwrap();
    devices
        .create(spec("leaf1", false, scope(&devices, "edge2")), 0)
        .unwrap();
    let ids = |devices: &Devices, edge: &str| -> Vec<String> {
        devices
            .children(devices.get(edge).unwrap())
            .map(|child| child.id.clone())
            .collect()
    };
    assert_eq!(ids(&devices, "edge2"), ["leaf1"]);
    devices
        .update(spec("leaf1", false, scope(&devices, "edge1")), None, 0)
        .unwrap();
    assert_eq!(ids(&devices, "edge2"), [""; 0]);
    assert_eq!(ids(&devices, "edge1"), ["edge2", "leaf1"]);
    assert_eq!(scope(&devices, "leaf1"), scope(&devices, "edge1"));
    devices.delete("edge1", None).unwrap();
    assert!(devices.parent(devices.get("edge2").unwrap()).is_none());
    assert_eq!(scope(&devices, "leaf1"), None);
    assert!(scope(&devices, "edge2").is_some());
}

#[test]
fn parents_that_do_not_fit_are_refused() {
    let mut devices = Devices::default();
    devices.create(spec("edge1", true, None), 0).unwrap();
    for level in 2..=EDGE_LEVELS_MAX {
        let above = scope(&devices, &format!("edge{}", level - 1));
        devices
            .create(spec(&format!("edge{level}"), true, above), 0)
            .unwrap();
    }
    let lowest = scope(&devices, "edge5");
    assert!(
        devices
            .create(spec("edge6", true, lowest.clone()), 0)
            .is_err()
    );
    devices
        .create(spec("leaf1", false, lowest.clone()), 0)
        .unwrap();
    assert!(
        devices
            .update(spec("edge2", true, lowest), None, 0)
            .is_err(),
        "a cycle"
    );
    assert!(
        devices
            .create(spec("leaf2", false, Some("nonsense".to_owned())), 0)
            .is_err()
    );
    assert!(
        devices.update(spec("leaf1", true, None), None, 0).is_err(),
        "capability"
    );
}

#[test]
fn etags_guard_changes() {
    let mut devices = Devices::default();
    devices.create(spec("leaf1", false, None), 0).unwrap();
    let etag = devices.get("leaf1").unwrap().etag.clone();
    devices
        .update(spec("leaf1", false, None), Some(&etag), 0)
        .unwrap();
    assert_eq!(
        devices.update(spec("leaf1", false, None), Some(&etag), 0),
        Err(RegistryError::Etag)
    );
    assert_eq!(
        devices.delete("leaf1", Some(&etag)),
        Err(RegistryError::Etag)
    );
}
