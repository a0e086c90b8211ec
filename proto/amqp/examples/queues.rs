//! Serves the queues of `tests/queues` on a port of the loopback address and prints that port, so
//! that clients in other languages can be tried against the engine. Ends when its input ends.

use std::io::Write;

use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::task::LocalSet;

#[path = "../tests/queues/mod.rs"]
mod queues;

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    writeln!(std::io::stdout(), "{}", listener.local_addr()?.port())?;
    let mut input = tokio::io::stdin();
    let mut ignored = [0; 64];
    let ends = async { while input.read(&mut ignored).await.is_ok_and(|read| read > 0) {} };
    let tasks = LocalSet::new();
    tokio::select! {
        error = tasks.run_until(queues::serve(listener)) => Err(error),
        () = ends => Ok(()),
    }
}
