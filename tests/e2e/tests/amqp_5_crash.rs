//! Acceptance 5 of the AMQP side, first half: the crash matrix of the skeleton with AMQP on every
//! link, those of the leaves and modules and those between the hubs.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "these are the tests"
)]

use edgehub_tests::crash::{self, Matrix, Speech};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_5_nothing_acknowledged_is_lost_when_every_hub_is_killed() {
    let matrix = Matrix {
        senders: Speech::Amqp,
        upstream: "Amqp",
        lane_window: 256,
    };
    crash::run(matrix).await;
}
