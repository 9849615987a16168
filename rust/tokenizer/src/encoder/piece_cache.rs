//! Pieces seen before and their tokens. Small at first, so that short texts stay in the processor's caches; bounded at last: then new
//! pieces push old ones out.

use std::ops::Range;

use crate::hashing::{hash_bytes, hash_u128};
use crate::piece_key::{SHORT_PIECE, long_key, short_key};

/// Sets of two pieces: 64 kB at first, 8 MB at most.
const FIRST_SETS: usize = 1 << 10;
const MOST_SETS: usize = 1 << 17;

/// Most tokens that an entry holds itself; of a piece with more it says where they are.
pub(super) const SHORT_TOKENS: usize = 4;

/// Bits of the first number of a value that hold how many tokens it has; ids are below 2^28.
const COUNT_SHIFT: u32 = 28;
const BELOW_COUNT: u32 = (1 << COUNT_SHIFT) - 1;

/// Stands for the number of tokens in the value of a piece whose tokens, or whose bytes, are in the store.
const STORED: u32 = SHORT_TOKENS as u32 + 1;

/// Longest piece that is kept.
const LONGEST_PIECE: usize = 256;

/// Bytes of the store before it starts afresh.
const MOST_STORED: usize = 6 << 20;

/// The key of no piece.
const EMPTY: u128 = 0;

/// Two pieces in one cache line, the newer one first.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Set {
    keys: [u128; 2],
    values: [Value; 2],
}

/// Up to four ids, their number in the top bits of the first; or for a piece in the store [`STORED`] in those bits and the number of ids
/// below them, where its ids start, where its bytes start, and 0.
type Value = [u32; SHORT_TOKENS];

impl Set {
    fn push(&mut self, key: u128, value: Value) {
        self.keys = [key, self.keys[0]];
        self.values = [value, self.values[0]];
    }
}

/// Tokens of pieces by their keys.
pub(super) struct PieceCache {
    sets: Vec<Set>,
    num_inserted: usize,
    /// Ids of pieces that have more than [`SHORT_TOKENS`], or are longer than a key.
    ids: Vec<u32>,
    /// Bytes of pieces that are longer than a key.
    bytes: Vec<u8>,
}

/// The key of `text[start..end]`: exact for a short piece, a hash for a longer one, the same for all pieces that are not kept.
#[inline(always)]
pub(super) fn key_of(text: &[u8], start: usize, end: usize) -> u128 {
    if end - start <= SHORT_PIECE {
        short_key(text, start, end)
    } else {
        key_of_long(&text[start..end])
    }
}

#[inline(never)]
fn key_of_long(piece: &[u8]) -> u128 {
    if piece.len() <= LONGEST_PIECE {
        long_key(hash_bytes(piece))
    } else {
        EMPTY
    }
}

impl PieceCache {
    pub fn new() -> Self {
        Self {
            sets: vec![Set::default(); FIRST_SETS],
            num_inserted: 0,
            ids: Vec::new(),
            bytes: Vec::new(),
        }
    }

    #[inline(always)]
    fn set_of(&self, key: u128) -> usize {
        (hash_u128(key) >> 32) as usize & (self.sets.len() - 1)
    }

    /// The tokens of a piece that has up to four, and their number: four slots of which the first ones count.
    #[inline(always)]
    pub fn get(&self, key: u128) -> Option<([u32; SHORT_TOKENS], usize)> {
        let Set { keys, values } = &self.sets[self.set_of(key)];
        // Which of the two it is cannot be predicted: select without a branch.
        let is_second = keys[1] == key;
        let mut value = values[usize::from(is_second)];
        let count = value[0] >> COUNT_SHIFT;
        value[0] &= BELOW_COUNT;
        // An empty entry has no tokens.
        let known = ((keys[0] == key) | is_second) & (count.wrapping_sub(1) < STORED - 1);
        known.then_some((value, count as usize))
    }

    /// The tokens of a piece that [`Self::get`] does not give, if they are in the store.
    pub fn get_stored(&self, key: u128, piece: &[u8]) -> Option<&[u32]> {
        let Set { keys, values } = &self.sets[self.set_of(key)];
        let way = keys.iter().position(|&known| known == key)?;
        let [tag, ids, bytes, _] = values[way];
        if tag >> COUNT_SHIFT != STORED {
            return None;
        }
        if piece.len() > SHORT_PIECE && self.bytes.get(range(bytes, piece.len())) != Some(piece) {
            return None;
        }
        self.ids.get(range(ids, (tag & BELOW_COUNT) as usize))
    }

    /// Remember a piece that is not there.
    pub fn insert(&mut self, key: u128, piece: &[u8], tokens: &[u32]) {
        if key == EMPTY {
            return;
        }
        let mut value = [0; SHORT_TOKENS];
        match value.get_mut(..tokens.len()) {
            Some(slots) if piece.len() <= SHORT_PIECE => {
                slots.copy_from_slice(tokens);
                value[0] |= (tokens.len() as u32) << COUNT_SHIFT;
            }
            _ => value = self.store(piece, tokens),
        }
        if self.num_inserted == self.sets.len() && self.sets.len() < MOST_SETS {
            self.grow();
        }
        self.num_inserted += 1;
        let set = self.set_of(key);
        self.sets[set].push(key, value);
    }

    fn store(&mut self, piece: &[u8], tokens: &[u32]) -> Value {
        if self.bytes.len() + size_of_val(&self.ids[..]) > MOST_STORED {
            self.start_store_afresh();
        }
        let tag = STORED << COUNT_SHIFT | tokens.len() as u32;
        let value = [tag, self.ids.len() as u32, self.bytes.len() as u32, 0];
        self.ids.extend_from_slice(tokens);
        if piece.len() > SHORT_PIECE {
            self.bytes.extend_from_slice(piece);
        }
        value
    }

    #[cold]
    fn start_store_afresh(&mut self) {
        self.ids.clear();
        self.bytes.clear();
        for Set { keys, values } in &mut self.sets {
            for (key, value) in keys.iter_mut().zip(values) {
                if value[0] >> COUNT_SHIFT == STORED {
                    (*key, *value) = (EMPTY, Value::default());
                }
            }
        }
    }

    #[cold]
    fn grow(&mut self) {
        let larger = vec![Set::default(); 2 * self.sets.len()];
        let old = std::mem::replace(&mut self.sets, larger);
        for Set { keys, values } in old {
            for way in [1, 0] {
                if keys[way] != EMPTY {
                    let set = self.set_of(keys[way]);
                    self.sets[set].push(keys[way], values[way]);
                }
            }
        }
    }
}

fn range(start: u32, len: usize) -> Range<usize> {
    start as usize..start as usize + len
}
