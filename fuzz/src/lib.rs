//! An allocator that counts, so that a length field which lies is noticed.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size(), Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATED.fetch_add(size, Relaxed);
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// What an input may allocate in all, however often it is copied: a header of five
/// bytes is a struct of 48, and three formats are made of each event.
const BYTES_PER_BYTE: usize = 256;
const BYTES_AT_LEAST: usize = 64 << 10;

/// Runs a property, and fails if it allocates more than its input accounts for.
pub fn bounded(property: fn(&[u8]), input: &[u8]) {
    let before = ALLOCATED.load(Relaxed);
    property(input);
    let allocated = ALLOCATED.load(Relaxed) - before;
    let most = BYTES_AT_LEAST + BYTES_PER_BYTE * input.len();
    assert!(allocated <= most, "{allocated} bytes allocated for {}", input.len());
}
