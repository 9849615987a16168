//! Persistent threads that share out work items.
//!
//! A call hands the threads one closure and a list of items. Each thread (the caller included) has a share of its own, a
//! run of neighbouring items, and takes from the ends of other shares when its own is done. So one call after the other, a
//! thread mostly meets the rows that it wrote before and that are in its cache still. Which thread runs an item is left to
//! chance all the same, so results must not depend on it: callers cut items by shape alone and let each write its own output.
//!
//! Between calls the workers spin for some microseconds and then sleep. The caller does not wait for workers that have
//! not woken up by the time all items are done, so a call costs about a microsecond more than its items.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::arena::{ArenaPool, Buffer};

/// How long a worker watches for the next call, and a caller for the last worker, before going to sleep.
const SPIN: Duration = Duration::from_micros(20);

/// Stack of a worker: kernels keep their big arrays in leased buffers.
const STACK_BYTES: usize = 2 << 20;

thread_local! {
    /// Whether this thread is running items of some pool; calls from within run on the spot.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// What the threads run: called once by each participant, with its index (0 is the caller).
type Body<'a> = dyn Fn(usize) + Sync + 'a;

/// State word: bit 0 tells whether a call takes participants, bits 1..16 count the workers inside, the rest is the
/// number of the call. One word, so that entering and closing cannot race.
mod state {
    pub const OPEN: u64 = 1;
    pub const ONE_INSIDE: u64 = 2;
    pub const CALL: u64 = 1 << 16;

    pub fn is_open(state: u64) -> bool {
        state & OPEN != 0
    }
    pub fn inside(state: u64) -> u64 {
        (state & (CALL - 1)) / ONE_INSIDE
    }
    pub fn call(state: u64) -> u64 {
        state / CALL
    }
}

/// The closure of the open call, its lifetime erased.
#[derive(Clone, Copy)]
struct ErasedBody(*const Body<'static>);

// SAFETY: the closure is `Sync`, and `Pool::run` does not return while a worker can reach it.
unsafe impl Send for ErasedBody {}

struct Shared {
    state: AtomicU64,
    body: Mutex<Option<ErasedBody>>,
    stopping: AtomicBool,
    /// Workers asleep (or about to be), waiting on `wake`; changed under `sleep`.
    sleepers: AtomicUsize,
    /// Whether the caller is asleep (or about to be), waiting on `done`.
    caller_sleeps: AtomicBool,
    sleep: Mutex<()>,
    wake: Condvar,
    done: Condvar,
    spin: Duration,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code of a caller runs under these locks, so a poisoned one guards nothing broken.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Spins until `ready` holds or the time is over; tells whether it held.
fn spin_until(limit: Duration, ready: impl Fn() -> bool) -> bool {
    if ready() {
        return true;
    }
    if limit.is_zero() {
        return false;
    }
    let start = Instant::now();
    loop {
        for _ in 0..32 {
            std::hint::spin_loop();
            if ready() {
                return true;
            }
        }
        if start.elapsed() >= limit {
            return false;
        }
    }
}

/// Items cut into one run of neighbours per participant, each on a cache line of its own.
struct Shares<I>(Vec<Share<I>>);

#[repr(align(128))]
struct Share<I>(Mutex<I>);

impl<I: DoubleEndedIterator + Default> Shares<I> {
    /// The next item of the participant's own share; where that is used up, the last one of the nearest other share.
    fn take(&self, participant: usize) -> Option<I::Item> {
        let first = lock(&self.0[participant].0).next();
        first.or_else(|| {
            (1..self.0.len()).find_map(|step| {
                let other = (participant + step) % self.0.len();
                lock(&self.0[other].0).next_back()
            })
        })
    }

    /// Drops the items that nobody has begun.
    fn abandon(&self) {
        for Share(share) in &self.0 {
            drop(std::mem::take(&mut *lock(share)));
        }
    }

    /// Runs `f` on items until none is left for this participant.
    fn work_off(&self, participant: usize, mut f: impl FnMut(I::Item)) {
        while let Some(item) = self.take(participant) {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| f(item))) {
                self.abandon();
                resume_unwind(panic);
            }
        }
    }
}

/// Bounds of share `i` of `count` items among `participants`.
fn share(count: usize, participants: usize, i: usize) -> Range<usize> {
    count * i / participants..count * (i + 1) / participants
}

impl<T> Shares<std::vec::IntoIter<T>> {
    fn of_items(mut items: Vec<T>, participants: usize) -> Self {
        let count = items.len();
        let mut shares: Vec<_> = (0..participants)
            .rev()
            .map(|i| items.split_off(share(count, participants, i).start))
            .map(|part| Share(Mutex::new(part.into_iter())))
            .collect();
        shares.reverse();
        Self(shares)
    }
}

impl Shares<Range<usize>> {
    fn of_indices(count: usize, participants: usize) -> Self {
        let share = |i| Share(Mutex::new(share(count, participants, i)));
        Self((0..participants).map(share).collect())
    }
}

impl Shared {
    /// A worker's life: wait for a call it has not seen, take part in it, leave.
    fn work(&self, worker: usize) {
        INSIDE.set(true);
        let mut seen = 0;
        loop {
            let fresh = |state: u64| state::is_open(state) && state::call(state) != seen;
            let ready = || self.stopping.load(SeqCst) || fresh(self.state.load(SeqCst));
            if !spin_until(self.spin, ready) {
                let mut guard = lock(&self.sleep);
                self.sleepers.fetch_add(1, SeqCst);
                while !ready() {
                    guard = self
                        .wake
                        .wait(guard)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                self.sleepers.fetch_sub(1, SeqCst);
            }
            if self.stopping.load(SeqCst) {
                return;
            }
            let entered = self.state.fetch_update(SeqCst, SeqCst, |state| {
                fresh(state).then(|| state + state::ONE_INSIDE)
            });
            let Ok(before) = entered else { continue };
            seen = state::call(before);
            let body = *lock(&self.body);
            if let Some(ErasedBody(body)) = body {
                // SAFETY: this worker is counted inside an open call, so `Pool::run` keeps the closure alive.
                unsafe { (*body)(worker) };
            }
            let after = self.state.fetch_sub(state::ONE_INSIDE, SeqCst) - state::ONE_INSIDE;
            if state::inside(after) == 0 && self.caller_sleeps.load(SeqCst) {
                let _guard = lock(&self.sleep);
                self.done.notify_all();
            }
        }
    }
}

/// Clears the thread's mark on the way out.
struct InsideMark {
    before: bool,
}

impl InsideMark {
    fn set() -> Self {
        Self {
            before: INSIDE.replace(true),
        }
    }
}

impl Drop for InsideMark {
    fn drop(&mut self) {
        INSIDE.set(self.before);
    }
}

/// Threads that run items together with the caller.
///
/// * With one thread there are no workers: everything runs in the caller.
/// * Items may call the pool again: such calls run on the spot, in the thread that makes them.
/// * Calls from several threads take turns.
/// * In a child made by `fork` the workers do not exist; there everything runs in the caller.
/// * Dropping the pool joins its threads.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    threads: usize,
    /// Held during a call.
    turn: Mutex<()>,
    /// One scratch buffer per participant, kept between calls.
    scratch: Vec<Mutex<Buffer>>,
    /// Memory that all participants of a call share.
    arenas: ArenaPool,
    /// The process that owns the workers.
    process: u32,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool of `threads` threads (at least one), the caller's included. Where the system refuses to start more threads
    /// the pool has fewer.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let wanted = threads.clamp(1, 4096);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            body: Mutex::new(None),
            stopping: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            caller_sleeps: AtomicBool::new(false),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            done: Condvar::new(),
            // With more threads than cores a spinning one takes the core of one that works.
            spin: if wanted > cores { Duration::ZERO } else { SPIN },
        });
        let mut workers = Vec::with_capacity(wanted - 1);
        for worker in 1..wanted {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new()
                .name(format!("ingot-{worker}"))
                .stack_size(STACK_BYTES);
            match thread.spawn(move || shared.work(worker)) {
                Ok(handle) => workers.push(handle),
                Err(_) => break,
            }
        }
        let threads = workers.len() + 1;
        let scratch = (0..threads).map(|_| Mutex::default()).collect();
        Self {
            shared,
            workers,
            threads,
            turn: Mutex::new(()),
            scratch,
            arenas: ArenaPool::new(),
            process: std::process::id(),
        }
    }

    /// Number of threads that run items, the caller's included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Buffers for what the threads of one call share, such as packed operands.
    pub(crate) fn arenas(&self) -> &ArenaPool {
        &self.arenas
    }

    /// Runs `f` once for each item, in no particular order, and returns when all are done.
    ///
    /// # Panics
    /// With the payload of the first panic of `f`, after all threads have stopped; items not yet begun are dropped.
    pub fn for_each<T: Send>(&self, items: Vec<T>, f: impl Fn(T) + Sync) {
        let alone = items.len() <= 1;
        let shares = Shares::of_items(items, self.participants(alone));
        self.run(alone, &|participant| shares.work_off(participant, &f));
    }

    /// As [`Pool::for_each`], with `scratch_floats` floats of the thread's own (64-byte aligned, unspecified contents,
    /// kept between calls) as second argument.
    ///
    /// # Panics
    /// As [`Pool::for_each`].
    pub fn for_each_with_scratch<T: Send>(
        &self,
        items: Vec<T>,
        scratch_floats: usize,
        f: impl Fn(T, &mut [f32]) + Sync,
    ) {
        let alone = items.len() <= 1;
        let shares = Shares::of_items(items, self.participants(alone));
        self.run(alone, &|participant| {
            self.with_scratch(participant, scratch_floats, |scratch| {
                shares.work_off(participant, |item| f(item, scratch));
            });
        });
    }

    /// Runs `f(index, scratch)` once for each index below `count`, with scratch as above; all in the caller if `alone` is
    /// set, for work too small to share.
    ///
    /// # Panics
    /// As [`Pool::for_each`].
    pub fn for_index(
        &self,
        alone: bool,
        count: usize,
        scratch_floats: usize,
        f: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let alone = alone || count <= 1;
        let shares = Shares::of_indices(count, self.participants(alone));
        self.run(alone, &|participant| {
            self.with_scratch(participant, scratch_floats, |scratch| {
                shares.work_off(participant, |index| f(index, scratch));
            });
        });
    }

    /// How many threads a call counts on: the caller alone, or all.
    fn participants(&self, alone: bool) -> usize {
        if self.runs_alone(alone) {
            1
        } else {
            self.threads
        }
    }

    /// Whether a call runs in its caller: it is too small, comes from within another one, or there are no workers.
    fn runs_alone(&self, alone: bool) -> bool {
        alone || self.workers.is_empty() || INSIDE.get() || self.process != std::process::id()
    }

    /// The participant's kept scratch, or a fresh one where that is in use further up the stack.
    fn with_scratch(&self, participant: usize, floats: usize, f: impl FnOnce(&mut [f32])) {
        let kept = match self.scratch[participant].try_lock() {
            Ok(guard) => Some(guard),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        };
        if let Some(mut buffer) = kept {
            if buffer.len() < floats {
                *buffer = Buffer::zeroed(floats);
            }
            f(&mut buffer[..floats]);
        } else {
            f(&mut Buffer::zeroed(floats));
        }
    }

    /// Lets the caller and every worker that arrives in time call `body`; returns when none is inside any more.
    fn run(&self, alone: bool, body: &Body<'_>) {
        if self.runs_alone(alone) {
            let _mark = InsideMark::set();
            body(0);
            return;
        }
        let turn = lock(&self.turn);
        let panic: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
        let caught = |participant: usize| {
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| body(participant))) {
                lock(&panic).get_or_insert(payload);
            }
        };
        let erased: *const Body<'_> = &raw const caught;
        #[allow(
            clippy::transmute_ptr_to_ptr,
            reason = "a cast cannot extend the lifetime"
        )]
        // SAFETY: only the lifetime changes. Workers dereference the pointer while counted inside an open call; `finish`
        // below closes the call and waits until none is, before `caught` and what it borrows go out of scope.
        let erased =
            unsafe { std::mem::transmute::<*const Body<'_>, *const Body<'static>>(erased) };
        self.open(ErasedBody(erased));
        {
            let _mark = InsideMark::set();
            caught(0);
        }
        self.finish();
        drop(turn);
        let payload = lock(&panic).take();
        if let Some(payload) = payload {
            resume_unwind(payload);
        }
    }

    /// Publishes the closure and wakes the sleeping workers.
    fn open(&self, body: ErasedBody) {
        let shared = &*self.shared;
        *lock(&shared.body) = Some(body);
        // Nobody is inside: the count is zero and stays so until the call is open.
        let call = state::call(shared.state.load(SeqCst)) + 1;
        shared.state.store(call * state::CALL + state::OPEN, SeqCst);
        if shared.sleepers.load(SeqCst) > 0 {
            // A worker that counted itself either sees the call before it waits or gets the notification: it holds the
            // lock in between.
            let _guard = lock(&shared.sleep);
            shared.wake.notify_all();
        }
    }

    /// Closes the call to newcomers and waits for the workers inside to leave.
    fn finish(&self) {
        let shared = &*self.shared;
        shared.state.fetch_and(!state::OPEN, SeqCst);
        let empty = || state::inside(shared.state.load(SeqCst)) == 0;
        if !spin_until(shared.spin, empty) {
            let mut guard = lock(&shared.sleep);
            shared.caller_sleeps.store(true, SeqCst);
            while !empty() {
                guard = shared
                    .done
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            shared.caller_sleeps.store(false, SeqCst);
        }
        *lock(&shared.body) = None;
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let workers = std::mem::take(&mut self.workers);
        if self.process != std::process::id() {
            // The threads stayed behind in the parent process: there is nothing to join here.
            workers.into_iter().for_each(std::mem::forget);
            return;
        }
        self.shared.stopping.store(true, SeqCst);
        {
            let _guard = lock(&self.shared.sleep);
            self.shared.wake.notify_all();
        }
        for worker in workers {
            // Items' panics were caught; a worker has no other way to fail.
            let _ = worker.join();
        }
    }
}
