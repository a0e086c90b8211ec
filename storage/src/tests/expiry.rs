//! Whose messages a sweep has found expired.

use edgehub_proto::message::{Message, SystemProperty};
use edgehub_proto::stored;

use super::*;
use crate::limits::EXPIRE_STEP;

#[tokio::test]
async fn a_sweep_names_who_sent_what_has_expired() {
    let (_dir, store) = fresh();
    let (a, b) = (queue(&store, "a"), queue(&store, "b"));
    let from_output = |output: &str| {
        let mut message = Message::default();
        message.system.set(SystemProperty::OutputName, output);
        stored::encode_message(&message)
    };
    let over = Some(NOW_MS + 1);
    let own = Append {
        message: from_output("out1"),
        ..message("edge1/modA", "", &[(&a, over)])
    };
    let shared = Append {
        message: from_output("out2"),
        ..message("edge1/modA", "", &[(&a, over), (&b, None)])
    };
    let later = message("leaf1", "", &[(&a, Some(NOW_MS + 9))]);
    append(
        &store,
        vec![own, message("leaf1", "", &[(&a, over)]), shared, later],
    )
    .await;

    let mut named = Vec::new();
    let mut each = |sender: &Identity, output: &str| named.push(format!("{sender} {output}"));
    assert_eq!(a.expire_each(NOW_MS, 100, &mut each).await.unwrap(), 0);
    assert_eq!(a.expire_each(NOW_MS + 1, 100, &mut each).await.unwrap(), 3);
    assert_eq!(a.expire_each(NOW_MS + 1, 100, &mut each).await.unwrap(), 0);
    assert_eq!(b.expire_each(u64::MAX, 100, &mut each).await.unwrap(), 0);
    assert_eq!(named, ["edge1/modA out1", "leaf1 ", "edge1/modA out2"]);
}

#[tokio::test]
async fn a_sweep_ends_where_the_queue_ended_when_it_began() {
    let (_dir, store) = fresh();
    let q = queue(&store, "q");
    let over = Some(NOW_MS);
    let count = 2 * EXPIRE_STEP as u64 + 1;
    let appends = (0..count).map(|_| message("leaf1", "x", &[(&q, over)]));
    append(&store, appends.collect()).await;

    // While it is under way as many arrive as it finds.
    let mut sender = Sender::new();
    let arrive = |_: &Identity, _: &str| {
        if sender.sequence == count {
            return;
        }
        let batch = sender.batch(vec![message("leaf2", "x", &[(&q, over)])]);
        store.try_append(batch).unwrap();
    };
    assert_eq!(
        q.expire_each(NOW_MS, usize::MAX, arrive).await.unwrap(),
        count
    );
    assert!(sender.committed().await);
    assert_eq!(q.length(), count);
    assert_eq!(q.expire(NOW_MS, usize::MAX).await.unwrap(), count);
    assert_eq!(q.length(), 0);
}
