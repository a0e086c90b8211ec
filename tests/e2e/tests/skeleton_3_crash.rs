//! Acceptance 3 of the walking skeleton: nothing acknowledged is lost, whatever is killed.

use edgehub_tests::crash::{self, Matrix, Speech};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_3_nothing_acknowledged_is_lost_when_every_hub_is_killed() {
    let matrix = Matrix {
        senders: Speech::Mqtt,
        upstream: "Mqtt",
        lane_window: 64,
    };
    crash::run(matrix).await;
}
