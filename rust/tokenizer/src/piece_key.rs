//! Pieces as 16-byte numbers: for short ones exact keys without a pointer to follow.

/// Longest piece that fits a key, together with its length.
pub(crate) const SHORT_PIECE: usize = 15;

/// Where the length is.
const LENGTH_SHIFT: u32 = 120;

/// In the place of the length in the key of a longer piece.
const LONG: u128 = 255;

/// The key of `text[start..end]`, a piece of 1 to [`SHORT_PIECE`] bytes: its bytes, zero-padded, and its length. Never 0.
#[inline(always)]
pub(crate) fn short_key(text: &[u8], start: usize, end: usize) -> u128 {
    let len = end - start;
    let mut bytes = [0; 16];
    match text.get(start..start + 16) {
        // One load of what may be too much, masked below, instead of a copy of variable length.
        Some(window) => bytes.copy_from_slice(window),
        None => bytes[..len].copy_from_slice(&text[start..end]),
    }
    (u128::from_le_bytes(bytes) & ((1 << (8 * len)) - 1)) | (len as u128) << LENGTH_SHIFT
}

/// The key of a longer piece with this hash: that of no short one. Never 0.
#[inline(always)]
pub(crate) fn long_key(hash: u64) -> u128 {
    u128::from(hash) | LONG << LENGTH_SHIFT
}

/// The piece behind the key of a short one.
pub(crate) fn short_piece(key: u128) -> Box<[u8]> {
    let len = (key >> LENGTH_SHIFT) as usize;
    key.to_le_bytes()[..len].into()
}
