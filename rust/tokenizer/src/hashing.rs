//! A fast hash for tables that live in memory only: multiply and fold, as in wyhash. Not for untrusted keys that could be chosen to
//! collide in an unbounded table; the piece caches are bounded and the other keys come from a vocabulary.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Odd constants without structure (digits of pi).
const K0: u64 = 0x243F_6A88_85A3_08D3;
const K1: u64 = 0x1319_8A2E_0370_7345;

/// `HashMap` with [`FoldHasher`].
pub(crate) type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<FoldHasher>>;

/// The 128-bit product of two words, folded to 64 bits.
#[inline(always)]
pub(crate) fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

/// Hash of a 16-byte key.
#[inline(always)]
pub(crate) fn hash_u128(key: u128) -> u64 {
    fold(key as u64 ^ K0, (key >> 64) as u64 ^ K1)
}

/// Hash of an 8-byte key.
#[inline(always)]
pub(crate) fn hash_u64(key: u64) -> u64 {
    fold(key ^ K0, K1)
}

/// Hash of bytes of any length.
pub(crate) fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut hash = fold(bytes.len() as u64 ^ K1, K0);
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        hash = fold(hash ^ u64::from_le_bytes(word), K1);
    }
    let rest = chunks.remainder();
    let mut word = [0; 8];
    word[..rest.len()].copy_from_slice(rest);
    fold(hash ^ u64::from_le_bytes(word), K0)
}

/// [`hash_bytes`] and [`hash_u64`] behind the standard trait.
#[derive(Default, Clone, Copy)]
pub(crate) struct FoldHasher(u64);

impl Hasher for FoldHasher {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = fold(self.0 ^ hash_bytes(bytes), K0);
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = hash_u64(self.0 ^ value);
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
