//! Character classes and UTF-8 decoding for the splitter.
//!
//! Four classes are enough for every supported pattern: `\p{L}`, `\p{N}`, `\s`, and the rest.

mod ranges;

use std::sync::LazyLock;

pub use ranges::VERSION;
use ranges::{LETTERS, NUMBERS, WHITE_SPACE};

/// What a pattern sees of a character.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Class {
    /// Neither letter, number nor white space; also each byte that is not part of valid UTF-8.
    Other = 0,
    /// `\p{L}`
    Letter = 1,
    /// `\p{N}`
    Number = 2,
    /// `\s`
    Space = 3,
}

/// Code points per block of the two-stage table.
const BLOCK: usize = 256;

/// Two-stage table: `blocks[index[code_point / BLOCK]][code_point % BLOCK]`.
struct ClassTable {
    index: Vec<u16>,
    blocks: Vec<[Class; BLOCK]>,
}

static TABLE: LazyLock<ClassTable> = LazyLock::new(ClassTable::build);

impl ClassTable {
    fn build() -> Self {
        let mut flat = vec![Class::Other; 0x11_0000];
        for (ranges, class) in [
            (LETTERS, Class::Letter),
            (NUMBERS, Class::Number),
            (WHITE_SPACE, Class::Space),
        ] {
            for &(first, last) in ranges {
                flat[first as usize..=last as usize].fill(class);
            }
        }
        let mut index = Vec::with_capacity(flat.len() / BLOCK);
        let mut blocks: Vec<[Class; BLOCK]> = Vec::new();
        for chunk in flat.chunks_exact(BLOCK) {
            let known = blocks.iter().position(|block| block == chunk);
            index.push(known.unwrap_or(blocks.len()) as u16);
            if known.is_none() {
                let mut block = [Class::Other; BLOCK];
                block.copy_from_slice(chunk);
                blocks.push(block);
            }
        }
        Self { index, blocks }
    }
}

/// The class of a code point (of any `u32`; what is no code point is [`Class::Other`]).
pub fn class_of(code_point: u32) -> Class {
    let table = &*TABLE;
    table
        .index
        .get(code_point as usize / BLOCK)
        .map_or(Class::Other, |&block| {
            table.blocks[usize::from(block)][code_point as usize % BLOCK]
        })
}

/// One step through bytes that are mostly UTF-8.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// Class of the character.
    pub class: Class,
    /// Its length in bytes, 1 to 4.
    pub len: usize,
}

/// The character at the start of `bytes`, which must not be empty. A byte that does not start a valid UTF-8 sequence (stray continuation,
/// truncated or overlong sequence, surrogate) is a character of its own of class [`Class::Other`].
pub fn step(bytes: &[u8]) -> Step {
    let (code_point, len) = decode(bytes);
    Step {
        class: code_point.map_or(Class::Other, class_of),
        len,
    }
}

/// Decode one scalar value (Unicode Standard, table 3-7); `None` and length 1 for a byte that starts none.
fn decode(bytes: &[u8]) -> (Option<u32>, usize) {
    let continuation = |i: usize, low: u8, high: u8| -> Option<u32> {
        let byte = *bytes.get(i)?;
        (low..=high)
            .contains(&byte)
            .then_some(u32::from(byte & 0x3F))
    };
    let any = |i: usize| continuation(i, 0x80, 0xBF);
    let lead = bytes[0];
    let decoded = match lead {
        0x00..=0x7F => Some((u32::from(lead), 1)),
        0xC2..=0xDF => any(1).map(|b| (u32::from(lead & 0x1F) << 6 | b, 2)),
        0xE0..=0xEF => {
            let (low, high) = match lead {
                0xE0 => (0xA0, 0xBF),
                0xED => (0x80, 0x9F),
                _ => (0x80, 0xBF),
            };
            continuation(1, low, high)
                .zip(any(2))
                .map(|(b, c)| (u32::from(lead & 0x0F) << 12 | b << 6 | c, 3))
        }
        0xF0..=0xF4 => {
            let (low, high) = match lead {
                0xF0 => (0x90, 0xBF),
                0xF4 => (0x80, 0x8F),
                _ => (0x80, 0xBF),
            };
            continuation(1, low, high)
                .zip(any(2))
                .zip(any(3))
                .map(|((b, c), d)| (u32::from(lead & 0x07) << 18 | b << 12 | c << 6 | d, 4))
        }
        _ => None,
    };
    decoded.map_or((None, 1), |(code_point, len)| (Some(code_point), len))
}

/// The class of the last character of `bytes`, by the same rule as [`step`]; `None` if `bytes` is empty.
pub fn last_class(bytes: &[u8]) -> Option<Class> {
    // A valid sequence that ends here starts at most four bytes back; bytes before it decode the same way whatever follows them.
    for len in 1..=bytes.len().min(4) {
        let tail = &bytes[bytes.len() - len..];
        let found = step(tail);
        if found.len == len && (len > 1 || tail[0] < 0x80) {
            return Some(found.class);
        }
    }
    (!bytes.is_empty()).then_some(Class::Other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_those_of_unicode_16() {
        let count = |class| (0..0x11_0000).filter(|&c| class_of(c) == class).count();
        assert_eq!(count(Class::Letter), 141_028);
        assert_eq!(count(Class::Number), 1_911);
        assert_eq!(count(Class::Space), 25);
    }

    #[test]
    fn valid_scalars_decode_to_themselves() {
        for c in (0..=0x10_FFFF).filter_map(char::from_u32) {
            let mut buffer = [0; 4];
            let bytes = c.encode_utf8(&mut buffer).as_bytes();
            assert_eq!(decode(bytes), (Some(u32::from(c)), bytes.len()));
            assert_eq!(last_class(bytes), Some(class_of(u32::from(c))));
        }
    }

    #[test]
    fn two_and_three_byte_strings_are_valid_exactly_when_the_standard_library_says_so() {
        for first in 0x80..=0xFFu8 {
            for second in 0..=0xFFu8 {
                for third in [0x00, 0x7F, 0x80, 0x9F, 0xA0, 0xBF, 0xC0, 0xFF] {
                    let bytes = [first, second, third];
                    let expected = (2..=3).find(|&n| {
                        std::str::from_utf8(&bytes[..n]).is_ok_and(|s| s.chars().count() == 1)
                    });
                    assert_eq!(decode(&bytes).1, expected.unwrap_or(1), "{bytes:02x?}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_code_point_is_other() {
        assert_eq!(class_of(0x11_0000), Class::Other);
        assert_eq!(class_of(u32::MAX), Class::Other);
    }
}
