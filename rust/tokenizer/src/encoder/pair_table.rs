//! Which pairs of neighbours merge, into what, and how early.

use std::collections::hash_map::Entry;

use crate::hashing::{FastMap, hash_u64};
use crate::vocabulary::{MergeRule, Vocabulary};

/// A merge: priority in the high half (smaller is earlier), the id it makes in the low half, so that the smallest value merges first.
/// Two pairs of equal priority make the same token, so comparing whole values is comparing priorities.
pub(super) type Merge = u64;

/// No merge: later than every merge.
pub(super) const NONE: Merge = u64::MAX;

/// Key of an empty slot; ids are below 2^28, so no pair has it.
const EMPTY: u64 = u64::MAX;

/// Open addressing with linear probing, at most half full.
pub(super) struct PairTable {
    slots: Vec<(u64, Merge)>,
    mask: usize,
    /// A bit for each hash of a pair, [`FILTER_BITS`] for each slot. Most neighbours do not merge, and this is small enough to say so
    /// from the processor's caches.
    filter: Vec<u64>,
    /// How two bytes merge, at 256 * left + right: where every piece starts.
    of_bytes: Vec<Merge>,
}

/// Bits of the filter per slot.
const FILTER_BITS: usize = 8;

/// The id that a merge makes.
#[inline(always)]
pub(super) fn made(merge: Merge) -> u32 {
    merge as u32
}

/// When a merge comes; larger than every real priority for [`NONE`].
#[inline(always)]
pub(super) fn priority(merge: Merge) -> u64 {
    merge >> 32
}

#[inline(always)]
fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

impl PairTable {
    /// The table of a vocabulary's rule.
    pub fn new(vocabulary: &Vocabulary) -> Self {
        let ids = vocabulary.ids();
        let mut pairs: FastMap<u64, Merge> = FastMap::default();
        match vocabulary.rule() {
            MergeRule::Listed { merges, .. } => {
                let mut joined = Vec::new();
                for (rank, &(left, right)) in merges.iter().enumerate() {
                    joined.clear();
                    for id in [left, right] {
                        joined.extend_from_slice(vocabulary.token(id).unwrap_or_default());
                    }
                    if let Some(&id) = ids.get(joined.as_slice()) {
                        // A pair listed twice keeps its last place, as in Hugging Face's table.
                        pairs.insert(key(left, right), (rank as u64) << 32 | u64::from(id));
                    }
                }
            }
            MergeRule::Ranks => {
                for (id, token) in vocabulary.ordinary() {
                    for middle in 1..token.len() {
                        let (left, right) = token.split_at(middle);
                        if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right))
                            && let Entry::Vacant(slot) = pairs.entry(key(left, right))
                        {
                            slot.insert(u64::from(id) << 32 | u64::from(id));
                        }
                    }
                }
            }
        }
        let size = (2 * pairs.len()).next_power_of_two().max(16);
        let mut table = Self {
            slots: vec![(EMPTY, NONE); size],
            mask: size - 1,
            filter: vec![0; size * FILTER_BITS / 64],
            of_bytes: Vec::with_capacity(1 << 16),
        };
        for (pair, merge) in pairs {
            table.insert(pair, merge);
        }
        for left in vocabulary.byte_ids() {
            for right in vocabulary.byte_ids() {
                table.of_bytes.push(table.get(*left, *right));
            }
        }
        table
    }

    fn insert(&mut self, pair: u64, merge: Merge) {
        let hash = hash_u64(pair) as usize;
        let (word, bit) = self.filter_bit(hash);
        self.filter[word] |= bit;
        let mut index = hash & self.mask;
        while self.slots[index].0 != EMPTY {
            index = (index + 1) & self.mask;
        }
        self.slots[index] = (pair, merge);
    }

    /// Word and bit of the filter: independent of the slot.
    #[inline(always)]
    fn filter_bit(&self, hash: usize) -> (usize, u64) {
        let index = hash >> 32 & (self.filter.len() - 1);
        (index, 1 << (hash >> 58))
    }

    /// How the bytes `left` and `right` merge, or [`NONE`].
    #[inline(always)]
    pub fn get_bytes(&self, left: u8, right: u8) -> Merge {
        self.of_bytes[usize::from(left) << 8 | usize::from(right)]
    }

    /// How `left` and `right` merge, or [`NONE`].
    #[inline(always)]
    pub fn get(&self, left: u32, right: u32) -> Merge {
        let pair = key(left, right);
        let hash = hash_u64(pair) as usize;
        let (word, bit) = self.filter_bit(hash);
        if self.filter[word] & bit == 0 {
            return NONE;
        }
        let mut index = hash & self.mask;
        loop {
            let (found, merge) = self.slots[index];
            if found == pair || found == EMPTY {
                // An empty slot holds NONE.
                return merge;
            }
            index = (index + 1) & self.mask;
        }
    }
}
