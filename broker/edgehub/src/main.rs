//! The edgeHub process: reads its settings, wires broker and bridge together, waits for the
//! signal to stop.

mod run;
mod upstream;

use std::process::ExitCode;
use std::sync::Arc;

use edgehub_broker::config::{Environment, Settings};
use edgehub_broker::telemetry::logs;
use edgehub_proto::clock::SystemClock;

/// Threads that read old backlog off the runtime; more readers wait.
const BLOCKING_THREADS_MAX: usize = 16;
/// Worker threads of the runtime, at most: more do not help a gateway.
const WORKERS_MAX: usize = 4;

fn main() -> ExitCode {
    let clock = Arc::new(SystemClock::new());
    let loaded = match Settings::load(Environment::of_process()) {
        Ok(loaded) => loaded,
        Err(error) => {
            let _ = logs::start("info", clock);
            tracing::error!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let ignored = logs::start(&loaded.settings.log_level, Arc::clone(&clock) as _);
    tracing::info!("Version - {}", env!("CARGO_PKG_VERSION"));
    for part in ignored {
        tracing::warn!("RuntimeLogLevel: {part:?} is neither a level nor a filter and is ignored");
    }
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    for problem in &loaded.problems {
        tracing::error!("{problem}");
    }
    let workers = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(WORKERS_MAX);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_name("edgehub")
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!("The runtime cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run::run(loaded.settings, clock)) {
        Ok(()) => {
            tracing::info!("Shutdown complete.");
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
