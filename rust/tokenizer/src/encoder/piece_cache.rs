//! Pieces seen before and their tokens. Small at first, so that short texts stay in the processor's caches; bounded at last: then new
//! pieces push old ones out.

use crate::hashing::{hash_bytes, hash_u128};

/// Sets of two pieces in the table of short pieces: 64 kB at first, 4 MB at most.
const FIRST_SETS: usize = 1 << 10;
const MOST_SETS: usize = 1 << 16;

/// Most tokens of an entry of the short table.
pub(super) const SHORT_TOKENS: usize = 4;

/// Bits of the first id that hold the number of tokens; ids are below 2^28.
const COUNT_SHIFT: u32 = 28;

/// Stands for the number of tokens of a piece that has more than an entry can hold.
const MANY: usize = SHORT_TOKENS + 1;

/// Entries in the table of longer pieces: 24 kB at first, 1.5 MB at most.
const FIRST_ENTRIES: usize = 1 << 10;
const MOST_ENTRIES: usize = 1 << 16;

/// Longest piece that is kept.
const LONGEST_PIECE: usize = 256;

/// Bytes of longer pieces that are kept before their table starts afresh.
const MOST_BYTES: usize = 4 << 20;

/// What the table of short pieces says of one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Known {
    /// Not seen, or forgotten.
    Nothing,
    /// Its tokens: four slots of which the first ones count.
    Tokens([u32; SHORT_TOKENS], usize),
    /// Its tokens are too many: they are with the longer pieces, unless forgotten there.
    Many,
}

/// Two pieces in one cache line, the newer one first.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Set {
    /// Bytes and length of each piece; 0 = empty.
    keys: [u128; 2],
    /// Up to four ids of each, their number in the top bits of the first.
    values: [[u32; SHORT_TOKENS]; 2],
}

impl Set {
    fn push(&mut self, key: u128, value: [u32; SHORT_TOKENS]) {
        self.keys = [key, self.keys[0]];
        self.values = [value, self.values[0]];
    }
}

/// Tokens of pieces that fit a 16-byte key.
pub(super) struct ShortPieces {
    sets: Vec<Set>,
    num_inserted: usize,
}

impl ShortPieces {
    pub fn new() -> Self {
        Self {
            sets: vec![Set::default(); FIRST_SETS],
            num_inserted: 0,
        }
    }

    #[inline(always)]
    fn set_of(&self, key: u128) -> usize {
        (hash_u128(key) >> 32) as usize & (self.sets.len() - 1)
    }

    /// What is known of a piece.
    #[inline(always)]
    pub fn get(&self, key: u128) -> Known {
        let Set { keys, values } = &self.sets[self.set_of(key)];
        // Which of the two it is cannot be predicted: select without a branch.
        let is_second = keys[1] == key;
        if !((keys[0] == key) | is_second) {
            return Known::Nothing;
        }
        let mut value = values[usize::from(is_second)];
        let count = (value[0] >> COUNT_SHIFT) as usize;
        value[0] &= (1 << COUNT_SHIFT) - 1;
        if count == MANY {
            Known::Many
        } else {
            Known::Tokens(value, count)
        }
    }

    /// Remember a piece that is not there. `false` if its tokens are too many to be kept here.
    pub fn insert(&mut self, key: u128, tokens: &[u32]) -> bool {
        let mut value = [0; SHORT_TOKENS];
        let slots = value.get_mut(..tokens.len());
        let fits = slots.is_some();
        if let Some(slots) = slots {
            slots.copy_from_slice(tokens);
        }
        let count = if fits { tokens.len() } else { MANY };
        value[0] |= (count as u32) << COUNT_SHIFT;
        if self.num_inserted == self.sets.len() && self.sets.len() < MOST_SETS {
            self.grow();
        }
        self.num_inserted += 1;
        let set = self.set_of(key);
        self.sets[set].push(key, value);
        fits
    }

    #[cold]
    fn grow(&mut self) {
        let larger = vec![Set::default(); 2 * self.sets.len()];
        let old = std::mem::replace(&mut self.sets, larger);
        for Set { keys, values } in old {
            for way in [1, 0] {
                if keys[way] != 0 {
                    let set = self.set_of(keys[way]);
                    self.sets[set].push(keys[way], values[way]);
                }
            }
        }
    }
}

#[derive(Clone, Copy, Default)]
struct LongEntry {
    /// 0 = empty.
    hash: u64,
    bytes: (u32, u32),
    ids: (u32, u32),
}

/// Tokens of pieces that are longer, or have more tokens, than an entry of [`ShortPieces`] can hold.
#[derive(Default)]
pub(super) struct LongPieces {
    entries: Vec<LongEntry>,
    bytes: Vec<u8>,
    ids: Vec<u32>,
    num_inserted: usize,
}

impl LongPieces {
    /// The tokens of a piece, if they are known.
    pub fn get(&self, piece: &[u8]) -> Option<&[u32]> {
        if piece.len() > LONGEST_PIECE || self.entries.is_empty() {
            return None;
        }
        let hash = hash_bytes(piece);
        let entry = &self.entries[hash as usize & (self.entries.len() - 1)];
        let known = entry.hash == hash && &self.bytes[range(entry.bytes)] == piece;
        known.then(|| &self.ids[range(entry.ids)])
    }

    /// Remember a piece, in the place of another one if need be.
    pub fn insert(&mut self, piece: &[u8], tokens: &[u32]) {
        if piece.len() > LONGEST_PIECE {
            return;
        }
        if self.bytes.len() + piece.len() > MOST_BYTES {
            *self = Self::default();
        }
        if 2 * self.num_inserted >= self.entries.len() && self.entries.len() < MOST_ENTRIES {
            self.grow();
        }
        self.num_inserted += 1;
        let bytes = append(&mut self.bytes, piece);
        let ids = append(&mut self.ids, tokens);
        let hash = hash_bytes(piece);
        self.place(LongEntry { hash, bytes, ids });
    }

    fn place(&mut self, entry: LongEntry) {
        let index = entry.hash as usize & (self.entries.len() - 1);
        self.entries[index] = entry;
    }

    #[cold]
    fn grow(&mut self) {
        let size = (2 * self.entries.len()).max(FIRST_ENTRIES);
        let old = std::mem::replace(&mut self.entries, vec![LongEntry::default(); size]);
        for entry in old.into_iter().filter(|entry| entry.hash != 0) {
            self.place(entry);
        }
    }
}

/// Append items and give back where they are.
fn append<T: Copy>(all: &mut Vec<T>, items: &[T]) -> (u32, u32) {
    let start = all.len() as u32;
    all.extend_from_slice(items);
    (start, all.len() as u32)
}

fn range((start, end): (u32, u32)) -> std::ops::Range<usize> {
    start as usize..end as usize
}
