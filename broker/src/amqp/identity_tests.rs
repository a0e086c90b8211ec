//! Who may do what on a connection, and how it ends (spec/amqp.md 1.4, 2.4, 3, 10.1, 10.4, 10.8,
//! 10.9; design.md D7): whole connections in memory, with a real hub and a real store.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use edgehub_auth::authenticator::{IdentityRefresh, RefreshOutcome};
use edgehub_auth::scope_cache::{ScopeCache, ScopeChange};
use edgehub_proto::identity::Identity;
use fe2o3_amqp::connection::OpenError;
use fe2o3_amqp::sasl_profile::SaslProfile;
use fe2o3_amqp::types::sasl::SaslCode;
use tokio::sync::Semaphore;

use super::connection::ConnectionEnd;
use super::limits::{CREDENTIAL_MAX, VERDICT_MAX};
use super::test_head::{Head, address, data, ended, on_detach, send};
use crate::test_support::{NOW_S, TestHub, id, key, leaf, sample_cache, token, token_with};

const UNAUTHORIZED: &str = "amqp:unauthorized-access";

/// Whoever sent what a commit could not store sends it again, on a link of its own choice; whoever
/// sent nothing is not touched.
#[cfg(feature = "faults")]
#[tokio::test]
async fn a_failed_commit_ends_the_links_of_its_senders_only() {
    let head = Head::new();
    let faults = head.hub.hub.store().faults();
    let mut client = head.client(&["leaf0", "leaf1"]).await;
    let mut unlucky = client.telemetry("leaf0").await.unwrap();
    let mut other = client.telemetry("leaf1").await.unwrap();
    assert_eq!(send(&mut unlucky, data(b"1")).await, Ok(()));
    faults.fail_next(1);
    let failed = send(&mut unlucky, data(b"2")).await;
    assert_eq!(failed.unwrap_err(), "amqp:internal-error");
    assert_eq!(send(&mut other, data(b"3")).await, Ok(()));
    let mut again = client.telemetry("leaf0").await.unwrap();
    assert_eq!(send(&mut again, data(b"2")).await, Ok(()));
    let senders: Vec<_> = head.stored().await.into_iter().map(|one| one.0).collect();
    assert_eq!(senders, ["leaf0", "leaf1", "leaf0"]);

    // Alone on its connection, it goes with it.
    let mut alone = head.client(&["edge1/modA"]).await;
    let mut link = alone.telemetry("edge1/modA").await.unwrap();
    faults.fail_next(1);
    let failed = send(&mut link, data(b"4")).await;
    assert_eq!(failed.unwrap_err(), "amqp:internal-error");
    let end = alone.task.await.unwrap();
    assert!(matches!(end, ConnectionEnd::Protocol(_)), "{end}");
}

// Tokens

#[tokio::test]
async fn a_token_is_judged_when_it_is_put() {
    let head = Head::new();
    let mut client = head.open().await;
    assert_eq!(client.put(&token("leaf0")).await, 200);
    let wrong = token_with("leaf0", &key("leaf0", 9), NOW_S + 3600);
    assert_eq!(client.put(&wrong).await, 401);
    let expired = token_with("leaf0", &key("leaf0", 0), NOW_S - 301);
    assert_eq!(client.put(&expired).await, 401);
    assert_eq!(client.put(&token("nobody")).await, 401);
    assert_eq!(client.put("nonsense").await, 400);
    // None of them took the place of the good one.
    let mut link = client.telemetry("leaf0").await.unwrap();
    assert_eq!(send(&mut link, data(b"1")).await, Ok(()));
    assert_eq!(head.stored().await[0].0, "leaf0");
}

#[tokio::test]
async fn a_token_that_cannot_be_judged_is_taken_and_the_attach_decides() {
    let scope = ScopeCache::new(&id("edge1"));
    let head = Head::of(TestHub::with_scope(Arc::clone(&scope)));
    let mut client = head.open().await;
    assert_eq!(client.put(&token("leaf0")).await, 200);
    let refused = client.telemetry("leaf0").await;
    assert_eq!(refused.unwrap_err(), "com.microsoft:timeout");
    scope.apply(ScopeChange::Upsert(crate::test_support::sample_scope()));
    scope.set_initialised();
    assert!(client.telemetry("leaf0").await.is_ok());
}

/// Upstream that knows `late`, and answers once for each permit.
#[derive(Debug)]
struct Late {
    scope: Arc<ScopeCache>,
    answers: Arc<Semaphore>,
}

impl IdentityRefresh for Late {
    fn refresh<'a>(
        &'a self,
        _: &'a Identity,
        _: &'a str,
    ) -> Pin<Box<dyn Future<Output = RefreshOutcome> + Send + 'a>> {
        Box::pin(async {
            self.answers.acquire().await.unwrap().forget();
            self.scope
                .apply(ScopeChange::Upsert(vec![leaf("late", "edge1")]));
            RefreshOutcome::Refreshed
        })
    }
}

#[tokio::test]
async fn an_attach_waits_for_the_verdict_and_nobody_else_does() {
    let scope = sample_cache();
    let answers = Arc::new(Semaphore::new(0));
    let late = Late {
        scope: Arc::clone(&scope),
        answers: Arc::clone(&answers),
    };
    let hub = TestHub::with_refresh(scope, Some(Arc::new(late)));
    let head = Head::of(hub);
    let mut client = head.client(&["leaf0"]).await;
    let mut known = client.telemetry("leaf0").await.unwrap();
    client.put_without_wait(&token("late")).await;
    // Behind the token on the same connection: the attach comes after it.
    assert_eq!(send(&mut known, data(b"1")).await, Ok(()));
    let attaching = async {
        let link = client.telemetry("late").await;
        (link, client)
    };
    let answered = async {
        for n in 0..3 {
            assert_eq!(send(&mut known, data(&[n])).await, Ok(()));
        }
        answers.add_permits(1);
    };
    let ((link, mut client), ()) = tokio::join!(attaching, answered);
    assert_eq!(send(&mut link.unwrap(), data(b"2")).await, Ok(()));
    assert_eq!(client.put_answer().await, 200);
    assert_eq!(head.stored().await.last().unwrap().0, "late");
}

#[tokio::test]
async fn a_link_without_a_token_is_refused_and_the_others_go_on() {
    let head = Head::new();
    let mut client = head.client(&["leaf0"]).await;
    let mut link = client.telemetry("leaf0").await.unwrap();
    for identity in ["leaf1", "leaf0/modA", "edge1/modA"] {
        let refused = client.telemetry(identity).await;
        assert_eq!(refused.unwrap_err(), UNAUTHORIZED, "{identity}");
    }
    for (address, condition) in [
        ("/devices/leaf0/x", "amqp:not-allowed"),
        ("/devices/leaf0/messages/deviceBound", "amqp:not-allowed"),
    ] {
        let refused = client.sender(address, &[]).await;
        assert_eq!(refused.unwrap_err(), condition, "{address}");
    }
    let events = address("leaf0", "messages/events");
    let refused = client.receiver(&events, &[]).await;
    assert_eq!(refused.unwrap_err(), "amqp:not-allowed");
    assert_eq!(send(&mut link, data(b"1")).await, Ok(()));
}

#[tokio::test]
async fn a_hub_below_acts_for_what_is_below_it_alone() {
    let head = Head::new();
    let mut client = head.client(&["edge2/$edgeHub"]).await;
    for (identity, chain, condition) in [
        ("leaf1", "leaf1;edge2", None),
        ("leaf1/modB", "leaf1/modB;leaf1;edge2", None),
        ("edge2/$edgeHub", "edge2/$edgeHub;edge2", None),
        ("leaf0", "leaf0;edge2", Some(UNAUTHORIZED)),
        ("leaf10", "leaf10;edge10;edge2", Some(UNAUTHORIZED)),
        ("leaf1", "leaf10;edge10", Some(UNAUTHORIZED)),
        ("leaf10", ";", Some(UNAUTHORIZED)),
    ] {
        let events = address(identity, "messages/events");
        let properties = [("com.microsoft:auth-chain", chain)];
        match (client.sender(&events, &properties).await, condition) {
            (Ok(mut link), None) => assert_eq!(send(&mut link, data(b"1")).await, Ok(())),
            (Err(refused), Some(condition)) => assert_eq!(refused, condition, "{chain}"),
            (outcome, _) => panic!("{identity} {chain}: {outcome:?}"),
        }
    }
    let senders: Vec<String> = head.stored().await.into_iter().map(|m| m.0).collect();
    assert_eq!(senders, ["leaf1", "leaf1/modB", "edge2/$edgeHub"]);
}

// Ends

#[tokio::test]
async fn another_connection_takes_only_its_identity_away() {
    let head = Head::new();
    let mut first = head.client(&["leaf0", "leaf1"]).await;
    let mut taken = first.telemetry("leaf0").await.unwrap();
    let mut kept = first.telemetry("leaf1").await.unwrap();
    let mut second = head.client(&["leaf0"]).await;
    let mut link = second.telemetry("leaf0").await.unwrap();
    assert_eq!(on_detach(&mut taken).await, "amqp:link:stolen");
    assert_eq!(send(&mut kept, data(b"1")).await, Ok(()));
    assert_eq!(send(&mut link, data(b"2")).await, Ok(()));

    // Whoever was the only one loses the connection.
    let mut third = head.client(&["leaf0"]).await;
    let _link = third.telemetry("leaf0").await.unwrap();
    assert_eq!(second.closed().await, "amqp:link:stolen");
    // And the first may have it back.
    let mut again = first.telemetry("leaf0").await.unwrap();
    assert_eq!(third.closed().await, "amqp:link:stolen");
    assert_eq!(send(&mut again, data(b"3")).await, Ok(()));
}

#[tokio::test]
async fn an_identity_that_is_removed_loses_its_links() {
    let head = Head::new();
    let hub = Arc::clone(&head.hub.hub);
    let watching = tokio::spawn(hub.watch_scope(head.stop.clone()));
    let mut client = head.client(&["leaf0", "leaf1"]).await;
    let mut kept = client.telemetry("leaf1").await.unwrap();
    let mut removed = client.telemetry("leaf0").await.unwrap();
    head.hub.scope.apply(ScopeChange::Remove(vec![id("leaf0")]));
    assert_eq!(on_detach(&mut removed).await, UNAUTHORIZED);
    assert_eq!(client.telemetry("leaf0").await.unwrap_err(), UNAUTHORIZED);
    assert_eq!(send(&mut kept, data(b"1")).await, Ok(()));
    head.stop.cancel();
    watching.await.unwrap();
    let end = client.task.await.unwrap();
    assert!(matches!(end, ConnectionEnd::Stopping), "{end}");
}

#[tokio::test]
async fn an_expired_token_ends_its_identity_and_a_renewed_one_does_not() {
    let head = Head::new();
    let short = |identity| token_with(identity, &key(identity, 0), NOW_S + 60);
    let mut client = head.client(&["leaf1"]).await;
    let mut kept = client.telemetry("leaf1").await.unwrap();
    assert_eq!(client.put(&short("leaf0")).await, 200);
    let mut link = client.telemetry("leaf0").await.unwrap();
    // With the skew of five minutes it lives for 360 s; steps are below the idle time-out.
    for _ in 0..2 {
        head.hub.clock.advance(Duration::from_secs(150));
        assert_eq!(send(&mut kept, data(b"1")).await, Ok(()));
    }
    assert_eq!(client.put(&token("leaf0")).await, 200);
    head.hub.clock.advance(Duration::from_secs(150));
    assert_eq!(send(&mut link, data(b"2")).await, Ok(()), "renewed");

    let mut client = head.client(&["edge2/$edgeHub"]).await;
    let expiry = NOW_S + 450 + 60;
    let brief = token_with("edge1/modA", &key("edge1/modA", 0), expiry);
    assert_eq!(client.put(&brief).await, 200);
    let mut link = client.telemetry("edge1/modA").await.unwrap();
    let mut other = client.telemetry("edge2/$edgeHub").await.unwrap();
    for _ in 0..2 {
        head.hub.clock.advance(Duration::from_secs(150));
        assert_eq!(send(&mut other, data(b"1")).await, Ok(()));
    }
    let wrong = token_with("edge1/modA", &key("edge1/modA", 9), expiry + 3600);
    assert_eq!(client.put(&wrong).await, 401, "renews nothing");
    head.hub.clock.advance(Duration::from_secs(61));
    let sent = send(&mut other, data(b"1")).await;
    assert_eq!(sent, Ok(()));
    assert_eq!(on_detach(&mut link).await, UNAUTHORIZED);
    assert_eq!(send(&mut other, data(b"1")).await, Ok(()));
}

#[tokio::test]
async fn the_last_link_of_an_identity_frees_its_place() {
    let head = Head::new();
    // Of four places.
    let mut client = head
        .client(&["leaf0", "leaf1", "edge1/modA", "leaf10", "edge2/$edgeHub"])
        .await;
    let mut links = Vec::new();
    for identity in ["leaf0", "leaf1", "edge1/modA", "leaf10"] {
        links.push(client.telemetry(identity).await.unwrap());
    }
    let refused = client.telemetry("edge2/$edgeHub").await;
    assert_eq!(refused.unwrap_err(), "amqp:resource-limit-exceeded");
    links.remove(0).close().await.unwrap();
    let mut link = client.telemetry("edge2/$edgeHub").await.unwrap();
    assert_eq!(send(&mut link, data(b"1")).await, Ok(()));
    assert_eq!(send(&mut links[0], data(b"2")).await, Ok(()));
    // Again and again: nothing of what is gone counts.
    links.push(link);
    for _ in 0..50 {
        links.pop().unwrap().close().await.unwrap();
        links.push(client.telemetry("leaf0").await.unwrap());
    }
    assert!(matches!(client.close().await, ConnectionEnd::Protocol(_)));
}

#[tokio::test]
async fn whoever_presents_nothing_good_must_go() {
    let head = Head::new();
    let mut silent = head.open().await;
    let wrong = token_with("leaf0", &key("leaf0", 9), NOW_S + 3600);
    assert_eq!(silent.put(&wrong).await, 401);
    let mut known = head.client(&["leaf0"]).await;
    head.hub
        .clock
        .advance(CREDENTIAL_MAX + Duration::from_secs(1));
    // What it says at last is what makes it be looked at.
    silent.put_without_wait("nonsense").await;
    assert_eq!(silent.closed().await, UNAUTHORIZED);
    assert!(known.telemetry("leaf0").await.is_ok());

    // A token that nobody can judge makes nobody known, and asking all the time neither.
    let head = Head::of(TestHub::with_scope(ScopeCache::new(&id("edge1"))));
    let mut stranger = head.open().await;
    assert_eq!(stranger.put(&token("leaf0")).await, 200);
    head.hub.clock.advance(CREDENTIAL_MAX + VERDICT_MAX);
    stranger.put_without_wait(&token("leaf0")).await;
    assert_eq!(stranger.closed().await, UNAUTHORIZED);
}

// SASL

#[tokio::test]
async fn sasl_plain_lets_one_identity_in() {
    let head = Head::new();
    let plain = |username: &str, password: String| SaslProfile::Plain {
        username: username.to_owned(),
        password,
    };
    let profile = plain("leaf0@sas.h", token("leaf0"));
    let mut client = head.open_with(Some(profile)).await.unwrap();
    let mut link = client.telemetry("leaf0").await.unwrap();
    assert_eq!(send(&mut link, data(b"1")).await, Ok(()));
    assert_eq!(client.telemetry("leaf1").await.unwrap_err(), UNAUTHORIZED);
    assert_eq!(
        client.sender("$cbs", &[]).await.unwrap_err(),
        "amqp:not-allowed"
    );

    let profile = plain("edge1/modules/modA@h", token("edge1/modA"));
    let mut client = head.open_with(Some(profile)).await.unwrap();
    assert!(client.telemetry("edge1/modA").await.is_ok());
    for (name, password) in [
        ("leaf0@sas.h", token("leaf1")),
        ("leaf0", token("leaf0")),
        ("leaf0@sas.h", "nonsense".to_owned()),
    ] {
        match head.open_with(Some(plain(name, password))).await {
            Err(OpenError::SaslError { code, .. }) => assert!(matches!(code, SaslCode::Auth)),
            Err(other) => panic!("{other:?}"),
            Ok(_) => panic!("{name} was let in"),
        }
    }
    let mut client = head.open_with(Some(SaslProfile::Anonymous)).await.unwrap();
    assert_eq!(client.put(&token("leaf0")).await, 200);
    assert!(client.telemetry("leaf0").await.is_ok());
}

// Pairs

#[tokio::test]
async fn there_is_one_link_of_each_kind_and_pairs_belong_together() {
    let head = Head::new();
    let mut client = head.client(&["leaf0"]).await;
    let mut older = client.telemetry("leaf0").await.unwrap();
    let mut newer = client.telemetry("leaf0").await.unwrap();
    assert_eq!(on_detach(&mut older).await, "ClosedByRemote");
    assert_eq!(send(&mut newer, data(b"1")).await, Ok(()));
    let (mut sender, mut receiver) = client.pair("leaf0", "twin", "twin:1").await;
    let twin = address("leaf0", "twin");
    let properties = [("com.microsoft:channel-correlation-id", "twin:2")];
    let _second = client.receiver(&twin, &properties).await.unwrap();
    assert_eq!(on_detach(&mut sender).await, "ClosedByRemote");
    assert_eq!(ended(&mut receiver).await, "");
    assert_eq!(send(&mut newer, data(b"1")).await, Ok(()));
}
