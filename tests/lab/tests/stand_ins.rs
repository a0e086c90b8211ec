//! The lab's handling of hosts, with shell scripts in the place of hub and emulator.

#![allow(clippy::unwrap_used, reason = "these are the tests")]

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use edgehub_lab::control::{self, ControlSocket, Request};
use edgehub_lab::lab_json::LabJson;
use edgehub_lab::{AtStart, Binaries, DeviceSpec, EdgeSpec, Lab, LabBuilder};
use tokio_util::sync::CancellationToken;

/// Says that it is ready as the emulator does, and stays.
const EMULATOR: &str = r#"#!/bin/sh
while [ $# -gt 0 ]; do
  if [ "$1" = --ready-file ]; then touch "$2"; fi
  shift
done
exec sleep 1000
"#;

/// Never ready: it does not listen.
const HUB: &str = "#!/bin/sh\necho \"I am $EdgeDeviceHostName\"\nexec sleep 1000\n";

fn binaries(folder: &Path, hub: &str) -> Binaries {
    let script = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    };
    Binaries {
        edgehub: script("edgehub", hub),
        emulator: script("iothub-emulator", EMULATOR),
        with_faults: false,
    }
}

/// Two layers whose hubs are started and not waited for.
fn builder(folder: &Path) -> LabBuilder {
    LabBuilder::new()
        .binaries(binaries(folder, HUB))
        .layers(2)
        .leaf("leaf1", "edge2")
        .module("edge2", "modA")
        .at_start("edge1", AtStart::Started)
        .at_start("edge2", AtStart::Started)
}

fn runs(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

async fn ask(lab: &Lab, request: Request) -> anyhow::Result<()> {
    let state = lab.state_dir().to_owned();
    tokio::task::spawn_blocking(move || control::ask(&state, &request)).await?
}

#[tokio::test]
async fn hosts_are_killed_started_paused_and_resumed_from_another_process() {
    let folder = tempfile::tempdir().unwrap();
    // A path far longer than a Unix socket's may be.
    let state = folder.path().join("a-long-name/".repeat(20));
    let lab = Arc::new(
        builder(folder.path())
            .state_dir(&state)
            .start()
            .await
            .unwrap(),
    );
    let end = CancellationToken::new();
    let socket = ControlSocket::bind(&lab).unwrap();
    let server = tokio::spawn(socket.serve(Arc::clone(&lab), end.clone()));
    let name = || "edge2".to_owned();
    let json = || LabJson::read(&lab.lab_json_path()).unwrap();
    let first = json();
    assert_eq!(first.layers.len(), 2);
    assert_eq!(first.layers[1].parent.as_deref(), Some("edge1"));
    let pid = first.layers[1].pid.unwrap();
    assert!(runs(pid));

    ask(&lab, Request::Pause { name: name() }).await.unwrap();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    assert!(stat.contains(") T "), "{stat}");
    ask(&lab, Request::Resume { name: name() }).await.unwrap();
    ask(&lab, Request::Kill { name: name() }).await.unwrap();
    assert!(!runs(pid));
    assert_eq!(json().layers[1].pid, None);
    assert!(
        ask(&lab, Request::Pause { name: name() }).await.is_err(),
        "it does not run"
    );

    ask(
        &lab,
        Request::Kill {
            name: "hub".to_owned(),
        },
    )
    .await
    .unwrap();
    assert_eq!(json().hub.pid, None);
    ask(
        &lab,
        Request::Start {
            name: "hub".to_owned(),
        },
    )
    .await
    .unwrap();
    assert_ne!(json().hub.pid, first.hub.pid);
    let again = ask(
        &lab,
        Request::Start {
            name: "hub".to_owned(),
        },
    )
    .await
    .unwrap_err();
    assert!(again.to_string().contains("runs already"), "{again}");

    let link = ("edge2".to_owned(), "edge1".to_owned());
    ask(
        &lab,
        Request::Cut {
            a: link.0.clone(),
            b: link.1.clone(),
        },
    )
    .await
    .unwrap();
    ask(
        &lab,
        Request::Heal {
            a: link.0,
            b: link.1,
        },
    )
    .await
    .unwrap();
    let unknown = ask(
        &lab,
        Request::Kill {
            name: "edge9".to_owned(),
        },
    )
    .await
    .unwrap_err();
    assert!(
        unknown.to_string().contains("there is no host edge9"),
        "{unknown}"
    );

    let twice = ask(
        &lab,
        Request::Cut {
            a: name(),
            b: name(),
        },
    )
    .await
    .unwrap_err();
    assert!(twice.to_string().contains("edge2 twice"), "{twice}");

    end.cancel();
    server.await.unwrap();
    let pids = [lab.pid("hub").unwrap(), lab.pid("edge1").unwrap()];
    Arc::into_inner(lab).unwrap().shutdown().await.unwrap();
    assert!(pids.into_iter().all(|pid| !runs(pid)));
    assert!(!state.join("lab.json").exists() && !state.join("lab.sock").exists());
}

#[tokio::test]
async fn names_resolve_logs_are_kept_and_a_dropped_lab_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let lab = builder(folder.path()).start().await.unwrap();
    let edge = lab.host("edge2").unwrap().clone();
    while !lab
        .log("edge2")
        .unwrap()
        .contains(&format!("I am {}", edge.hostname))
    {
        tokio::task::yield_now().await;
    }
    let found = tokio::net::lookup_host((edge.hostname.as_str(), edge.ports.mqtts))
        .await
        .unwrap();
    assert_eq!(found.map(|a| a.ip()).collect::<Vec<_>>(), [edge.address]);
    // The relay has every public port; nobody is behind it, which is a reset, sooner or later.
    for port in [edge.ports.mqtts, edge.ports.https, edge.ports.metrics] {
        let connected = tokio::net::TcpStream::connect((edge.address, port)).await;
        let refused = connected.is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused);
        assert!(!refused, "nobody listens on {}:{port}", edge.address);
    }
    let pids: Vec<u32> = ["hub", "edge1", "edge2"]
        .map(|name| lab.pid(name).unwrap())
        .into();
    let state = lab.state_dir().to_owned();
    drop(lab);
    assert!(pids.into_iter().all(|pid| !runs(pid)));
    assert!(!state.exists());
    let hosts = fs::read_to_string("/etc/hosts").unwrap();
    assert!(!hosts.contains(&edge.hostname), "{hosts}");
}

#[tokio::test]
async fn two_labs_run_side_by_side_and_a_state_folder_keeps_keys_and_certificates() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let start = || builder(folder.path()).state_dir(&state).start();
    let lab = start().await.unwrap();
    let other = builder(folder.path())
        .host_names(false)
        .start()
        .await
        .unwrap();
    let hub = other.host("hub").unwrap();
    assert_eq!(hub.hostname, hub.address.to_string());
    assert_ne!(hub.address, lab.host("hub").unwrap().address);
    assert!(start().await.unwrap_err().to_string().contains("runs in"));

    let string = lab.connection_string("leaf1", Some("edge2")).unwrap();
    let root = fs::read(lab.ca_file()).unwrap();
    drop(lab);
    let lab = start().await.unwrap();
    let again = lab.connection_string("leaf1", Some("edge2")).unwrap();
    assert_eq!(again.shared_access_key, string.shared_access_key);
    assert_eq!(fs::read(lab.ca_file()).unwrap(), root);
}

#[tokio::test]
async fn any_identity_can_be_registered_anywhere() {
    let folder = tempfile::tempdir().unwrap();
    let disabled = DeviceSpec {
        enabled: false,
        ..DeviceSpec::new("off", Some("edge1"))
    };
    let sibling = DeviceSpec {
        iot_edge: true,
        ..DeviceSpec::new("edge10", Some("edge1"))
    };
    let lab = LabBuilder::new()
        .binaries(binaries(folder.path(), HUB))
        .edge(EdgeSpec {
            at_start: AtStart::Off,
            ..EdgeSpec::new("edge1", None)
        })
        .edge(EdgeSpec {
            at_start: AtStart::Off,
            ..EdgeSpec::new("edge2", Some("edge1"))
        })
        .leaf("middle", "edge1")
        .module("edge1", "modA")
        .device(disabled)
        .device(sibling)
        .at_start("hub", AtStart::Off)
        .start()
        .await
        .unwrap();
    let json = lab.lab_json().unwrap();
    assert_eq!(json.hub.pid, None);
    assert!(json.layers.iter().all(|layer| layer.pid.is_none()));
    assert!(json.layers.iter().all(|layer| layer.amqps.is_some()));
    let events = json.hub.eventhub_connection_string.unwrap();
    let endpoint = format!("Endpoint=sb://{}/;", json.hub.hostname);
    assert!(events.starts_with(&endpoint), "{events}");
    let label = json.hub.hostname.split('.').next().unwrap();
    let path = format!(";EntityPath={label}-events");
    assert!(events.ends_with(&path), "{events}");
    let ids: Vec<_> = json
        .identities
        .iter()
        .map(|i| (i.id.as_str(), i.parent.as_str()))
        .collect();
    assert_eq!(ids, [("middle", "edge1"), ("edge1/modA", "edge1")]);
    for id in ["off", "edge10/$edgeHub"] {
        lab.connection_string(id, None).unwrap();
    }
    assert_eq!(lab.ledger().count().unwrap(), 0);
    lab.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_hub_that_ends_or_is_never_ready_fails_the_start_with_its_log() {
    let folder = tempfile::tempdir().unwrap();
    let broken = "#!/bin/sh\necho no such certificate\nexit 1\n";
    let start = |hub: &str| {
        let builder = LabBuilder::new()
            .binaries(binaries(folder.path(), hub))
            .layers(1);
        builder.patience(Duration::from_millis(500)).start()
    };
    let error = format!("{:#}", start(broken).await.unwrap_err());
    assert!(
        error.contains("exit status: 1") && error.contains("no such certificate"),
        "{error}"
    );
    let error = format!("{:#}", start(HUB).await.unwrap_err());
    assert!(error.contains("edge1 is not ready after 500ms"), "{error}");
    assert!(error.contains("I am "), "{error}");
}
