//! Work on a fixed list of items with several threads. Which thread takes which item never shows in a result.

use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Result, TokenizerError};

/// Called now and then on the caller's own thread; may ask to stop.
pub type Tick<'a> = dyn FnMut() -> ControlFlow<()> + 'a;

/// Time between two ticks.
const TICK: Duration = Duration::from_millis(50);

/// Calls a [`Tick`] at most every 50 ms.
pub(crate) struct Ticker<'a, 'b> {
    tick: &'a mut Tick<'b>,
    last: Instant,
}

impl<'a, 'b> Ticker<'a, 'b> {
    pub fn new(tick: &'a mut Tick<'b>) -> Self {
        Self {
            tick,
            last: Instant::now(),
        }
    }

    /// An error if the caller wants to stop.
    pub fn poll(&mut self) -> Result<()> {
        if self.last.elapsed() < TICK {
            return Ok(());
        }
        self.last = Instant::now();
        match (self.tick)() {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(TokenizerError::Interrupted),
        }
    }
}

/// `work(state, item)` for each item; one state per thread, results in the order of the items. The caller's thread works too.
pub(crate) fn map<Item: Sync, State: Send, Output: Send>(
    items: &[Item],
    states: &mut [State],
    ticker: &mut Ticker<'_, '_>,
    work: impl Fn(&mut State, &Item) -> Output + Sync,
) -> Result<Vec<Output>> {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let done: Vec<Mutex<Option<Output>>> = items.iter().map(|_| Mutex::new(None)).collect();
    let take = |state: &mut State| {
        if stop.load(Ordering::Relaxed) {
            return false;
        }
        let index = next.fetch_add(1, Ordering::Relaxed);
        let Some(item) = items.get(index) else {
            return false;
        };
        let output = work(state, item);
        if let Ok(mut slot) = done[index].lock() {
            *slot = Some(output);
        }
        true
    };
    let Some((own, others)) = states.split_first_mut() else {
        return Ok(Vec::new());
    };
    let spawned = others.len().min(items.len().saturating_sub(1));
    thread::scope(|scope| {
        for state in &mut others[..spawned] {
            scope.spawn(|| while take(state) {});
        }
        while take(own) {
            if let Err(error) = ticker.poll() {
                stop.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    })?;
    let outputs = done
        .into_iter()
        .filter_map(|slot| slot.into_inner().ok().flatten());
    Ok(outputs.collect())
}
