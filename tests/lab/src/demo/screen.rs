//! Standard output: redrawn in place on a terminal, a line at a time everywhere else.

use std::io::{IsTerminal as _, Write as _};

/// What is on the screen.
#[derive(Debug)]
pub(super) struct Screen {
    terminal: bool,
    /// Lines of the block at the bottom that the next drawing replaces.
    drawn: usize,
}

impl Screen {
    pub(super) fn new() -> Self {
        Self {
            terminal: std::io::stdout().is_terminal(),
            drawn: 0,
        }
    }

    pub(super) const fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Prints lines that stay, above the block.
    pub(super) fn note(&mut self, line: &str) {
        let text = self.erase() + line + "\n";
        self.put(&text);
    }

    /// Replaces the block at the bottom.
    pub(super) fn draw(&mut self, lines: &[String]) {
        let mut text = self.erase();
        // A line that is too long is cut off and not wrapped: the next drawing counts rows.
        let (begin, end) = if self.terminal {
            ("\x1b[?7l", "\x1b[?7h")
        } else {
            ("", "")
        };
        text.push_str(begin);
        for line in lines {
            text.push_str(line);
            text.push('\n');
        }
        text.push_str(end);
        self.put(&text);
        if self.terminal {
            self.drawn = lines.len();
        }
    }

    /// Leaves the block where it is; what follows is printed below.
    pub(super) const fn keep(&mut self) {
        self.drawn = 0;
    }

    fn erase(&mut self) -> String {
        match std::mem::take(&mut self.drawn) {
            0 => String::new(),
            // Up, and clear from there to the end of the screen.
            lines => format!("\x1b[{lines}A\x1b[J"),
        }
    }

    fn put(&self, text: &str) {
        // A reader that has gone away is no reason to stop judging.
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(text.as_bytes());
        let _ = out.flush();
    }
}
