//! Aligned buffers of f32 that are kept between steps.
//!
//! The first touch of fresh memory costs far more than using it (page faults), so large buffers are made once and leased
//! again and again.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Alignment of every buffer in bytes: one cache line, one 512-bit register.
pub const ALIGNMENT: usize = 64;

/// Floats per unit of alignment.
pub(crate) const LINE: usize = ALIGNMENT / size_of::<f32>();

/// Buffers of at least this many bytes are aligned to it and offered to the kernel as huge pages.
const HUGE_PAGE: usize = 2 << 20;

/// A zero-initialised `[f32]` whose first element is aligned to 64 bytes.
pub struct Buffer {
    pointer: NonNull<f32>,
    len: usize,
}

// SAFETY: the buffer owns its memory; f32 has no thread affinity.
unsafe impl Send for Buffer {}
// SAFETY: shared access gives only `&[f32]`.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A buffer of `len` zeros.
    ///
    /// # Panics
    /// If `len` floats exceed the address space.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self {
                pointer: NonNull::dangling(),
                len,
            };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout has a non-zero size.
        let raw = unsafe { alloc(layout) };
        #[allow(
            clippy::cast_ptr_alignment,
            reason = "the layout asks for more than f32 needs"
        )]
        let Some(pointer) = NonNull::new(raw.cast::<f32>()) else {
            handle_alloc_error(layout)
        };
        // The advice has to come before the first touch, which is why the zeros are not left to the allocator.
        if layout.size() >= HUGE_PAGE {
            advise_huge_pages(raw, layout.size());
        }
        // SAFETY: `len` floats were just allocated.
        unsafe { pointer.write_bytes(0, len) };
        Self { pointer, len }
    }

    fn layout(len: usize) -> Layout {
        let size = len
            .checked_mul(size_of::<f32>())
            .expect("buffer length overflows the address space");
        let align = if size >= HUGE_PAGE {
            HUGE_PAGE
        } else {
            ALIGNMENT
        };
        Layout::from_size_align(size, align).expect("buffer length overflows the address space")
    }
}

impl Default for Buffer {
    /// An empty buffer, without memory.
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `zeroed` with the layout of the same length.
            unsafe { dealloc(self.pointer.as_ptr().cast(), Self::layout(self.len)) }
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: `len` initialised floats (zeroed on creation), owned by self; dangling but aligned where `len` is 0.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }
}

/// Tells the kernel that the whole huge pages of a range may be backed by such; failure is of no consequence.
#[cfg(target_os = "linux")]
fn advise_huge_pages(pointer: *mut u8, size: usize) {
    const MADV_HUGEPAGE: std::ffi::c_int = 14;
    unsafe extern "C" {
        fn madvise(
            address: *mut std::ffi::c_void,
            length: usize,
            advice: std::ffi::c_int,
        ) -> std::ffi::c_int;
    }
    // SAFETY: the range starts at a huge-page boundary and is cut to whole huge pages inside one live allocation; the
    // advice does not change its contents.
    unsafe {
        madvise(pointer.cast(), size / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_pointer: *mut u8, _size: usize) {}

/// Buffers that are lent by capacity and come back when their [`Lease`] is dropped. One is freed only to be replaced by a
/// larger one, so a program that repeats its requests stops allocating after the first round.
/// A clone is another handle of the same pool.
#[derive(Clone, Debug, Default)]
pub struct ArenaPool {
    free: Arc<Mutex<Vec<Buffer>>>,
}

impl ArenaPool {
    /// A pool without buffers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lends `len` floats with unspecified (initialised) contents: the smallest free buffer that is large enough, or a
    /// new one of zeros.
    pub fn lease(&self, len: usize) -> Lease {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = (0..free.len())
            .filter(|&i| free[i].len() >= len)
            .min_by_key(|&i| free[i].len());
        let buffer = fitting.map(|i| free.swap_remove(i));
        drop(free);
        Lease {
            owner: self.clone(),
            buffer: buffer.unwrap_or_else(|| Buffer::zeroed(len)),
            len,
        }
    }

    /// Number of floats in the buffers that are not lent at the moment.
    #[must_use]
    pub fn free_floats(&self) -> usize {
        self.free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .map(|buffer| buffer.len())
            .sum()
    }
}

/// A buffer lent by an [`ArenaPool`]; goes back when dropped.
#[derive(Debug)]
pub struct Lease {
    owner: ArenaPool,
    buffer: Buffer,
    len: usize,
}

impl Deref for Lease {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.buffer[..self.len]
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[..self.len]
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        if !buffer.is_empty() {
            self.owner
                .free
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_zero() {
        for len in [0, 1, 15, 16, 17, 1000, 600_000] {
            let buffer = Buffer::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.as_ptr().addr().is_multiple_of(ALIGNMENT) || len == 0);
            assert!(buffer.iter().all(|&x| x.to_bits() == 0));
        }
    }

    #[test]
    fn clones_hold_their_own_values() {
        let mut first = Buffer::zeroed(3);
        first[1] = 2.0;
        let second = first.clone();
        first[1] = 5.0;
        assert_eq!(&*second, &[0.0, 2.0, 0.0]);
    }

    #[test]
    fn leases_come_back_and_the_smallest_that_fits_is_taken() {
        let arenas = ArenaPool::new();
        let large = arenas.lease(1000);
        let small = arenas.lease(10);
        let (large_at, small_at) = (large.as_ptr(), small.as_ptr());
        drop(large);
        drop(small);
        assert_eq!(arenas.free_floats(), 1010);
        let again = arenas.lease(8);
        assert_eq!((again.len(), again.as_ptr()), (8, small_at));
        let more = arenas.lease(9);
        assert_eq!((more.len(), more.as_ptr()), (9, large_at));
        assert_eq!(arenas.free_floats(), 0);
    }
}
