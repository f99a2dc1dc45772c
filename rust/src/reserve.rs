//! Memory for ourselves where the system has none left.
//!
//! Rust ends the process when an allocation fails. What llama.cpp is refused comes back as an error,
//! but to say so takes a few small strings, an exception, and an end for each request. So what Rust
//! itself asks for goes on to a reserve when malloc refuses it, as C++ keeps one for its exceptions.
//! The reserve is empty again when everything in it was given back; an allocation that is too large
//! for it, or comes when it is full, is still the end.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering};

const RESERVE_BYTES: usize = 256 * 1024;
const LARGEST: usize = 16 * 1024;
const COUNT_BITS: u32 = 32;
const COUNT: u64 = (1 << COUNT_BITS) - 1;

pub(crate) struct Patient {
    reserve: UnsafeCell<Reserve>,
    /// The bytes that were handed out in the upper half, and how many pieces still live in the lower:
    /// one number, so that the last piece and the first of the next round cannot miss each other.
    state: AtomicU64,
}

#[repr(align(4096))]
struct Reserve {
    _bytes: [u8; RESERVE_BYTES],
}

// SAFETY: every byte of the reserve belongs to one piece at a time, which `state` sees to.
unsafe impl Sync for Patient {}

impl Patient {
    pub(crate) const fn new() -> Patient {
        Patient {
            reserve: UnsafeCell::new(Reserve { _bytes: [0; RESERVE_BYTES] }),
            state: AtomicU64::new(0),
        }
    }

    fn begin(&self) -> *mut u8 {
        self.reserve.get().cast()
    }

    fn has(&self, piece: *mut u8) -> bool {
        (piece as usize).wrapping_sub(self.begin() as usize) < RESERVE_BYTES
    }

    #[cold]
    fn take(&self, layout: Layout) -> *mut u8 {
        if layout.size() > LARGEST || layout.align() > align_of::<Reserve>() {
            return std::ptr::null_mut();
        }
        let mut state = self.state.load(Ordering::Acquire);
        loop {
            let from = ((state >> COUNT_BITS) as usize).next_multiple_of(layout.align());
            let to = from + layout.size();
            if to > RESERVE_BYTES {
                return std::ptr::null_mut();
            }
            let next = (to as u64) << COUNT_BITS | ((state & COUNT) + 1);
            match self.state.compare_exchange_weak(state, next, Ordering::AcqRel, Ordering::Acquire)
            {
                // SAFETY: the piece ends within the reserve.
                Ok(_) => return unsafe { self.begin().add(from) },
                Err(other) => state = other,
            }
        }
    }

    #[cold]
    fn give_back(&self) {
        let left = |state: u64| match state & COUNT {
            1 => Some(0), // the last one: from the beginning again
            _ => Some(state - 1),
        };
        let _ = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, left);
    }
}

// SAFETY: what the system refuses is a piece of the reserve, which nobody else has, or refused.
unsafe impl GlobalAlloc for Patient {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let given = unsafe { System.alloc(layout) };
        if given.is_null() { self.take(layout) } else { given }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let given = unsafe { System.alloc_zeroed(layout) };
        if !given.is_null() {
            return given;
        }
        let taken = self.take(layout);
        if !taken.is_null() {
            unsafe { taken.write_bytes(0, layout.size()) };
        }
        taken
    }

    unsafe fn dealloc(&self, piece: *mut u8, layout: Layout) {
        if self.has(piece) { self.give_back() } else { unsafe { System.dealloc(piece, layout) } }
    }

    unsafe fn realloc(&self, piece: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !self.has(piece) {
            let given = unsafe { System.realloc(piece, layout, size) };
            if !given.is_null() {
                return given;
            }
        }
        // SAFETY: the caller promises that the size is right for this alignment.
        let other = unsafe { self.alloc(Layout::from_size_align_unchecked(size, layout.align())) };
        if !other.is_null() {
            unsafe {
                other.copy_from_nonoverlapping(piece, size.min(layout.size()));
                self.dealloc(piece, layout);
            }
        }
        other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(size: usize) -> Layout {
        Layout::from_size_align(size, 16).unwrap()
    }

    #[test]
    fn pieces_do_not_overlap_and_are_aligned_as_asked() {
        let patient = Patient::new();
        let (a, b) =
            (patient.take(bytes(10)), patient.take(Layout::from_size_align(8, 4096).unwrap()));
        assert!(patient.has(a) && patient.has(b));
        assert_eq!((a as usize % 16, b as usize % 4096, b as usize - a as usize), (0, 0, 4096));
    }

    #[test]
    fn it_begins_anew_when_everything_was_given_back() {
        let patient = Patient::new();
        for _ in 0..10_000 {
            let (a, b) = (patient.take(bytes(10_000)), patient.take(bytes(10_000)));
            assert_eq!((a, b as usize - a as usize), (patient.begin(), 10_000));
            // SAFETY: both are its own.
            unsafe {
                patient.dealloc(a, bytes(10_000));
                patient.dealloc(b, bytes(10_000));
            }
        }
    }

    #[test]
    fn what_is_too_large_or_comes_when_it_is_full_is_refused() {
        let patient = Patient::new();
        assert!(patient.take(bytes(LARGEST + 1)).is_null());
        for _ in 0..RESERVE_BYTES / LARGEST {
            assert!(!patient.take(bytes(LARGEST)).is_null());
        }
        assert!(patient.take(bytes(1)).is_null());
    }

    #[test]
    fn what_grows_out_of_it_keeps_what_was_in_it() {
        let patient = Patient::new();
        let piece = patient.take(bytes(4));
        // SAFETY: all pieces come from this allocator, with these layouts.
        unsafe {
            piece.copy_from_nonoverlapping(b"abcd".as_ptr(), 4);
            let grown = patient.realloc(piece, bytes(4), 100);
            assert!(!patient.has(grown));
            assert_eq!(std::slice::from_raw_parts(grown, 4), b"abcd");
            assert_eq!(patient.take(bytes(1)), patient.begin());
            patient.dealloc(grown, bytes(100));
        }
    }

    #[test]
    fn threads_never_share_a_piece() {
        static PATIENT: Patient = Patient::new();
        std::thread::scope(|scope| {
            for number in 0..8u8 {
                scope.spawn(move || {
                    for _ in 0..20_000 {
                        let piece = PATIENT.take(bytes(64));
                        if piece.is_null() {
                            continue;
                        }
                        // SAFETY: this thread's alone, until it gives it back.
                        unsafe {
                            piece.write_bytes(number, 64);
                            let seen = std::slice::from_raw_parts(piece, 64);
                            assert!(seen.iter().all(|&byte| byte == number));
                            PATIENT.dealloc(piece, bytes(64));
                        }
                    }
                });
            }
        });
    }
}
