//! One piece -> its tokens: always the earliest merge, the leftmost one among equals.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::pair_table::{Merge, NONE, PairTable, made, priority};

/// Up to here scanning for the smallest merge beats a heap.
const SHORT: usize = 64;

/// Scratch memory that is kept between pieces.
#[derive(Default)]
pub(super) struct Scratch {
    heap: BinaryHeap<Reverse<(Merge, usize)>>,
    /// Per byte of the piece: where the next token starts, and where the one before does.
    next: Vec<usize>,
    previous: Vec<usize>,
    ids: Vec<u32>,
    merges: Vec<Merge>,
}

/// Append the tokens of `piece` to `out`.
pub(super) fn merge_piece(
    table: &PairTable,
    byte_ids: &[u32; 256],
    piece: &[u8],
    scratch: &mut Scratch,
    out: &mut Vec<u32>,
) {
    merge_with(table, |merge| merge, byte_ids, piece, scratch, out);
}

/// As [`merge_piece`], but only with the merges of priority smaller than `rank`.
pub(super) fn merge_piece_below(
    rank: u32,
    table: &PairTable,
    byte_ids: &[u32; 256],
    piece: &[u8],
    scratch: &mut Scratch,
    out: &mut Vec<u32>,
) {
    let early = |merge| {
        if priority(merge) < u64::from(rank) {
            merge
        } else {
            NONE
        }
    };
    merge_with(table, early, byte_ids, piece, scratch, out);
}

/// `keep` gives each merge back, or [`NONE`] in its place.
#[inline(always)]
fn merge_with(
    table: &PairTable,
    keep: impl Fn(Merge) -> Merge,
    byte_ids: &[u32; 256],
    piece: &[u8],
    scratch: &mut Scratch,
    out: &mut Vec<u32>,
) {
    if piece.len() <= SHORT {
        merge_short(table, keep, byte_ids, piece, out);
    } else {
        merge_long(table, keep, byte_ids, piece, scratch, out);
    }
}

/// Quadratic in the length, but on arrays of at most [`SHORT`] entries.
fn merge_short(
    table: &PairTable,
    keep: impl Fn(Merge) -> Merge,
    byte_ids: &[u32; 256],
    piece: &[u8],
    out: &mut Vec<u32>,
) {
    let mut ids = [0u32; SHORT];
    // merges[i]: how tokens i and i + 1 merge.
    let mut merges = [NONE; SHORT];
    let mut len = piece.len();
    for (id, &byte) in ids.iter_mut().zip(piece) {
        *id = byte_ids[usize::from(byte)];
    }
    for (merge, pair) in merges.iter_mut().zip(piece.windows(2)) {
        *merge = keep(table.get_bytes(pair[0], pair[1]));
    }
    while len > 1 {
        let mut best = NONE;
        let mut at = 0;
        for (i, &merge) in merges[..len - 1].iter().enumerate() {
            if merge < best {
                best = merge;
                at = i;
            }
        }
        if best == NONE {
            break;
        }
        ids[at] = made(best);
        ids.copy_within(at + 2..len, at + 1);
        merges.copy_within(at + 1..len, at);
        len -= 1;
        merges[len - 1] = NONE;
        if at + 1 < len {
            merges[at] = keep(table.get(ids[at], ids[at + 1]));
        }
        if at > 0 {
            merges[at - 1] = keep(table.get(ids[at - 1], ids[at]));
        }
    }
    out.extend_from_slice(&ids[..len]);
}

/// Linked list and heap: n log n for any piece.
fn merge_long(
    table: &PairTable,
    keep: impl Fn(Merge) -> Merge,
    byte_ids: &[u32; 256],
    piece: &[u8],
    scratch: &mut Scratch,
    out: &mut Vec<u32>,
) {
    let Scratch {
        heap,
        next,
        previous,
        ids,
        merges,
    } = scratch;
    let len = piece.len();
    heap.clear();
    next.clear();
    next.extend(1..=len);
    previous.clear();
    // The first token has none before it: wraps to usize::MAX, which is out of range.
    previous.extend((0..len).map(|i| i.wrapping_sub(1)));
    ids.clear();
    ids.extend(piece.iter().map(|&byte| byte_ids[usize::from(byte)]));
    // merges[i]: how the token at i and its successor merge; NONE where no token starts any more.
    merges.clear();
    let pairs = piece.windows(2);
    merges.extend(pairs.map(|pair| keep(table.get_bytes(pair[0], pair[1]))));
    merges.push(NONE);
    let known = merges
        .iter()
        .enumerate()
        .filter(|&(_, &merge)| merge != NONE);
    heap.extend(known.map(|(i, &merge)| Reverse((merge, i))));

    while let Some(Reverse((merge, at))) = heap.pop() {
        // Stale: one of the two tokens has merged otherwise since.
        if merges[at] != merge {
            continue;
        }
        let eaten = next[at];
        let after = next[eaten];
        ids[at] = made(merge);
        next[at] = after;
        merges[eaten] = NONE;
        merges[at] = NONE;
        if after < len {
            previous[after] = at;
            merges[at] = keep(table.get(ids[at], ids[after]));
            if merges[at] != NONE {
                heap.push(Reverse((merges[at], at)));
            }
        }
        let before = previous[at];
        if before < len {
            merges[before] = keep(table.get(ids[before], ids[at]));
            if merges[before] != NONE {
                heap.push(Reverse((merges[before], before)));
            }
        }
    }
    let mut at = 0;
    while at < len {
        out.push(ids[at]);
        at = next[at];
    }
}
