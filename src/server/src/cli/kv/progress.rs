//! A progress bar on standard error, for a person: nothing is drawn where standard error is no terminal.

use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressStyle};

/// How often the bar is drawn.
const INTERVAL: Duration = Duration::from_millis(100);

/// A bar over bytes where their number is known, else a spinner; beside it entries and entries a second.
pub(crate) struct Progress {
    bar: ProgressBar,
    start: Instant,
    drawn: Option<Instant>,
}

impl Progress {
    pub(crate) fn new(len_bytes: Option<u64>) -> Self {
        // indicatif draws on standard error and hides itself where that is no terminal.
        let (bar, template) = match len_bytes {
            Some(len_bytes) => (
                ProgressBar::new(len_bytes),
                "{wide_bar} {percent:>3}%  {msg}  {eta} left",
            ),
            None => (ProgressBar::new_spinner(), "{spinner} {msg}  {elapsed}"),
        };
        let style = ProgressStyle::with_template(template).expect("invariant: both templates are well-formed");
        Self {
            bar: bar.with_style(style),
            start: Instant::now(),
            drawn: None,
        }
    }

    /// Says how far it is.
    pub(crate) fn update(&mut self, read_bytes: u64, entries: u64) {
        if self.bar.is_hidden() || self.drawn.is_some_and(|drawn| drawn.elapsed() < INTERVAL) {
            return;
        }
        self.drawn = Some(Instant::now());
        let per_second = per_second(entries, self.start.elapsed());
        self.bar.set_position(read_bytes);
        self.bar
            .set_message(format!("{} entries, {}/s", HumanCount(entries), HumanCount(per_second)));
        self.bar.tick();
    }

    /// Runs something that writes on standard error, with the bar out of its way.
    pub(crate) fn suspend(&self, print: impl FnOnce()) {
        self.bar.suspend(print);
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// A rate in whole numbers.
pub(crate) fn per_second(count: u64, elapsed: Duration) -> u64 {
    let elapsed_us = elapsed.as_micros().max(1);
    u64::try_from(u128::from(count) * 1_000_000 / elapsed_us).unwrap_or(u64::MAX)
}
