//! A ledger dump as an HTTP body: read from the file piece by piece, as the client takes it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::body::{Body, Frame};
use tokio::sync::mpsc;

use crate::ledger::Dump;
use crate::limits::DUMP_CHUNK_BYTES;

/// Pieces that a blocking thread reads ahead of the client.
const PIECES_AHEAD: usize = 2;

pub(super) struct LedgerBody {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
}

impl LedgerBody {
    pub(super) fn new(mut dump: Dump) -> Self {
        let (sender, pieces) = mpsc::channel(PIECES_AHEAD);
        // Ends when the client goes away, because the channel closes then.
        tokio::task::spawn_blocking(move || {
            while let Some(piece) = dump.read(DUMP_CHUNK_BYTES).transpose() {
                let failed = piece.is_err();
                if sender.blocking_send(piece.map(Bytes::from)).is_err() || failed {
                    return;
                }
            }
        });
        Self { pieces }
    }
}

impl Body for LedgerBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let piece = ready!(self.pieces.poll_recv(cx));
        Poll::Ready(piece.map(|piece| piece.map(Frame::data)))
    }
}
