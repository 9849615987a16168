//! The thread pool: every item once, panics passed on, nesting, forking, stopping.
#![allow(
    clippy::float_cmp,
    reason = "values that were stored come back as they were"
)]

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ingot_kernels::Pool;

#[test]
fn every_item_runs_once() {
    for threads in [1, 2, 3, 8] {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads);
        for count in [0, 1, 2, 100] {
            let counts: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            pool.for_each((0..count).collect(), |i: usize| {
                counts[i].fetch_add(1, SeqCst);
            });
            pool.for_index(false, count, 0, |i, _| {
                counts[i].fetch_add(1, SeqCst);
            });
            assert!(
                counts.iter().all(|count| count.load(SeqCst) == 2),
                "{threads} threads, {count} items"
            );
        }
    }
}

#[test]
fn items_may_carry_exclusive_borrows() {
    let pool = Pool::new(3);
    let mut data = vec![0_usize; 1000];
    pool.for_each(data.chunks_mut(7).enumerate().collect(), |(i, part)| {
        part.fill(i);
    });
    assert!(data.iter().enumerate().all(|(i, &x)| x == i / 7));
}

#[test]
fn many_short_calls_neither_hang_nor_lose_items() {
    let pool = Pool::new(4);
    let total = AtomicUsize::new(0);
    for call in 0..5000 {
        pool.for_index(false, call % 7, 0, |_, _| {
            total.fetch_add(1, SeqCst);
        });
        if call % 1000 == 0 {
            // Long enough for the workers to fall asleep.
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    assert_eq!(total.load(SeqCst), (0..5000).map(|call| call % 7).sum());
}

#[test]
fn several_threads_share_the_work() {
    let pool = Pool::new(2);
    let seen = Mutex::new(HashSet::new());
    // An item that waits for the other thread would hang if one thread did everything.
    let barrier = std::sync::Barrier::new(2);
    pool.for_index(false, 2, 0, |_, _| {
        seen.lock().unwrap().insert(std::thread::current().id());
        barrier.wait();
    });
    assert_eq!(seen.lock().unwrap().len(), 2);
}

#[test]
fn one_thread_means_the_caller() {
    let pool = Pool::new(1);
    let caller = std::thread::current().id();
    pool.for_each(vec![(); 10], |()| {
        assert_eq!(std::thread::current().id(), caller);
    });
    assert_eq!(Pool::new(0).threads(), 1);
}

#[test]
fn scratch_is_aligned_large_enough_and_private() {
    let pool = Pool::new(3);
    for floats in [0, 5, 1000] {
        pool.for_each_with_scratch((0..50).collect(), floats, |i: usize, scratch| {
            assert_eq!(scratch.len(), floats);
            assert!(floats == 0 || scratch.as_ptr().addr().is_multiple_of(64));
            scratch.fill(i as f32);
            std::thread::yield_now();
            assert!(scratch.iter().all(|&x| x == i as f32));
        });
    }
}

#[test]
fn nested_calls_run_on_the_spot_with_scratch_of_their_own() {
    let pool = Pool::new(3);
    let total = AtomicUsize::new(0);
    pool.for_each_with_scratch((0..20).collect(), 8, |i: usize, outer| {
        outer.fill(i as f32);
        let thread = std::thread::current().id();
        pool.for_each_with_scratch((0..10).collect(), 8, |_: usize, inner| {
            assert_eq!(std::thread::current().id(), thread);
            inner.fill(-1.0);
            total.fetch_add(1, SeqCst);
        });
        assert!(outer.iter().all(|&x| x == i as f32));
    });
    assert_eq!(total.load(SeqCst), 200);
}

#[test]
fn calls_from_several_threads_take_turns() {
    let pool = Pool::new(2);
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    pool.for_index(false, 5, 16, |i, scratch| {
                        scratch.fill(i as f32);
                        total.fetch_add(1, SeqCst);
                    });
                }
            });
        }
    });
    assert_eq!(total.load(SeqCst), 4 * 200 * 5);
}

/// Counts its drops.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, SeqCst);
    }
}

#[test]
fn a_panic_comes_out_with_its_payload_and_the_pool_lives_on() {
    for threads in [1, 3] {
        let pool = Pool::new(threads);
        let dropped = Arc::new(AtomicUsize::new(0));
        let items: Vec<(usize, Counted)> = (0..100)
            .map(|i| (i, Counted(Arc::clone(&dropped))))
            .collect();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.for_each(items, |(i, _counted)| {
                if i == 40 {
                    std::panic::panic_any("item 40");
                }
            });
        }));
        assert_eq!(
            outcome.unwrap_err().downcast_ref::<&str>(),
            Some(&"item 40")
        );
        assert_eq!(
            dropped.load(SeqCst),
            100,
            "every item is dropped once, run or not"
        );

        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.for_index(false, 9, 4, |i, _| assert!(i != 5));
        }));
        assert!(outcome.is_err());
        let total = AtomicUsize::new(0);
        pool.for_each_with_scratch(vec![(); 9], 4, |(), _| {
            total.fetch_add(1, SeqCst);
        });
        assert_eq!(total.load(SeqCst), 9, "{threads} threads");
    }
}

#[test]
fn dropping_joins_the_threads() {
    for _ in 0..50 {
        let pool = Pool::new(4);
        pool.for_index(false, 4, 0, |_, _| {});
        let start = Instant::now();
        drop(pool);
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}

/// A forked child has no workers: it must neither wait for them in a call nor when it drops the pool.
#[cfg(target_os = "linux")]
#[test]
#[allow(unsafe_code, reason = "fork has no safe interface")]
fn a_forked_child_runs_everything_itself() {
    unsafe extern "C" {
        fn fork() -> i32;
        fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
        fn _exit(status: i32) -> !;
        fn kill(pid: i32, signal: i32) -> i32;
    }
    const WNOHANG: i32 = 1;
    const SIGKILL: i32 = 9;

    let pool = Pool::new(4);
    pool.for_index(false, 100, 16, |_, _| {});
    // SAFETY: the child uses only the pool (whose locks are free: no call is running) and leaves by `_exit`.
    let child = unsafe { fork() };
    if child == 0 {
        let total = AtomicUsize::new(0);
        pool.for_index(false, 100, 16, |_, _| {
            total.fetch_add(1, SeqCst);
        });
        drop(pool);
        // SAFETY: ends the child at once.
        unsafe { _exit(i32::from(total.load(SeqCst) != 100)) }
    }
    assert!(child > 0, "fork failed");
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut status = -1;
    // SAFETY: waits for the child made above.
    while unsafe { waitpid(child, &raw mut status, WNOHANG) } == 0 {
        if Instant::now() > deadline {
            // SAFETY: ends the child made above.
            unsafe { kill(child, SIGKILL) };
            panic!("the child hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(status, 0, "the child's wait status");
    let total = AtomicUsize::new(0);
    pool.for_index(false, 10, 0, |_, _| {
        total.fetch_add(1, SeqCst);
    });
    assert_eq!(total.load(SeqCst), 10, "the parent's pool still works");
}
