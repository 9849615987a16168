//! Pieces seen before and their tokens. Bounded: new entries push old ones out.

use crate::hashing::{hash_bytes, hash_u128};

/// Sets of two entries in the table of short pieces: 4 MB at most, touched as it fills.
const SETS: usize = 1 << 16;

/// Most tokens of an entry of the short table.
pub(super) const SHORT_TOKENS: usize = 4;

/// Bits of the first id that hold the number of tokens; ids are below 2^28.
const COUNT_SHIFT: u32 = 28;

/// Entries in the table of longer pieces, and longest piece kept in it.
const LONG_ENTRIES: usize = 1 << 16;
const LONG_PIECE: usize = 256;

/// Bytes and ids of longer pieces kept before that table starts afresh.
const LONG_BYTES: usize = 8 << 20;

/// Two pieces in one cache line.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Set {
    /// Bytes and length of each piece; 0 = empty.
    keys: [u128; 2],
    /// Up to four ids of each, their number in the top bits of the first.
    values: [[u32; SHORT_TOKENS]; 2],
}

#[derive(Clone, Copy, Default)]
struct LongEntry {
    hash: u64,
    bytes: (u32, u32),
    ids: (u32, u32),
}

/// Both tables.
pub(super) struct PieceCache {
    short: Vec<Set>,
    long: Vec<LongEntry>,
    long_bytes: Vec<u8>,
    long_ids: Vec<u32>,
}

impl PieceCache {
    pub fn new() -> Self {
        Self {
            short: vec![Set::default(); SETS],
            long: Vec::new(),
            long_bytes: Vec::new(),
            long_ids: Vec::new(),
        }
    }

    /// The set of a key; a handle for [`Self::insert_short`].
    #[inline(always)]
    pub fn set_of(key: u128) -> usize {
        (hash_u128(key) >> 32) as usize & (SETS - 1)
    }

    /// Tokens of a short piece: four slots of which the first `count` count.
    #[inline(always)]
    pub fn get_short(&self, set: usize, key: u128) -> Option<([u32; SHORT_TOKENS], usize)> {
        let Set { keys, values } = &self.short[set];
        // Which of the two it is cannot be predicted: select without a branch.
        let is_second = keys[1] == key;
        let mut value = values[usize::from(is_second)];
        let count = (value[0] >> COUNT_SHIFT) as usize;
        value[0] &= (1 << COUNT_SHIFT) - 1;
        ((keys[0] == key) | is_second).then_some((value, count))
    }

    /// Remember the tokens of a short piece, if there are few. The older of the two pieces of the set is forgotten.
    pub fn insert_short(&mut self, set: usize, key: u128, tokens: &[u32]) {
        if tokens.len() > SHORT_TOKENS {
            return;
        }
        let mut value = [0; SHORT_TOKENS];
        value[..tokens.len()].copy_from_slice(tokens);
        value[0] |= (tokens.len() as u32) << COUNT_SHIFT;
        let set = &mut self.short[set];
        set.keys = [key, set.keys[0]];
        set.values = [value, set.values[0]];
    }

    /// Append the tokens of a longer piece to `out`, if they are known.
    pub fn get_long(&self, piece: &[u8], out: &mut Vec<u32>) -> bool {
        if piece.len() > LONG_PIECE || self.long.is_empty() {
            return false;
        }
        let hash = hash_bytes(piece);
        let entry = &self.long[hash as usize & (LONG_ENTRIES - 1)];
        let known = entry.hash == hash && &self.long_bytes[range(entry.bytes)] == piece;
        if known {
            out.extend_from_slice(&self.long_ids[range(entry.ids)]);
        }
        known
    }

    /// Remember the tokens of a longer piece.
    pub fn insert_long(&mut self, piece: &[u8], tokens: &[u32]) {
        if piece.len() > LONG_PIECE {
            return;
        }
        if self.long.is_empty() || self.long_bytes.len() + piece.len() > LONG_BYTES {
            self.long.clear();
            self.long.resize(LONG_ENTRIES, LongEntry::default());
            self.long_bytes.clear();
            self.long_ids.clear();
        }
        let hash = hash_bytes(piece);
        let (byte_start, id_start) = (self.long_bytes.len() as u32, self.long_ids.len() as u32);
        self.long_bytes.extend_from_slice(piece);
        self.long_ids.extend_from_slice(tokens);
        self.long[hash as usize & (LONG_ENTRIES - 1)] = LongEntry {
            hash,
            bytes: (byte_start, self.long_bytes.len() as u32),
            ids: (id_start, self.long_ids.len() as u32),
        };
    }
}

fn range((start, end): (u32, u32)) -> std::ops::Range<usize> {
    start as usize..end as usize
}
