//! Runs of one class: what the machines of all patterns are made of.

use crate::unicode::{Class, Step, step};

/// Class of each ASCII byte; [`HIGH`] for the others.
const ASCII: [u8; 256] = ascii_classes();

/// The byte belongs to a longer (or broken) sequence: decode it.
const HIGH: u8 = 4;

const fn ascii_classes() -> [u8; 256] {
    let mut table = [HIGH; 256];
    let mut byte = 0;
    while byte < 128 {
        let b = byte as u8;
        table[byte] = if b.is_ascii_alphabetic() {
            Class::Letter as u8
        } else if b.is_ascii_digit() {
            Class::Number as u8
        } else if b == b' ' || (b >= 0x09 && b <= 0x0D) {
            Class::Space as u8
        } else {
            Class::Other as u8
        };
        byte += 1;
    }
    table
}

/// The character at `position`, or `None` at the end.
#[inline(always)]
pub(super) fn peek(text: &[u8], position: usize) -> Option<Step> {
    let byte = *text.get(position)?;
    let class = match ASCII[usize::from(byte)] {
        0 => Class::Other,
        1 => Class::Letter,
        2 => Class::Number,
        3 => Class::Space,
        _ => return Some(step_outlined(text, position)),
    };
    Some(Step { class, len: 1 })
}

/// Kept out of line so that the ASCII path stays small.
#[inline(never)]
fn step_outlined(text: &[u8], position: usize) -> Step {
    step(&text[position..])
}

/// How many of the eight bytes from `position` on are ASCII letters up to the first that is none; `None` if there are no eight bytes.
/// All are looked at at once: where a word ends no branch can foretell.
#[inline(always)]
fn ascii_letters(text: &[u8], position: usize) -> Option<usize> {
    const HIGH_BITS: u64 = each(0x80);
    let &bytes = text.get(position..)?.first_chunk()?;
    let word = u64::from_le_bytes(bytes);
    let lower = (word | each(0x20)) & !HIGH_BITS;
    // A sum sets the high bit of a byte that is at least a, or past z; none carries into the next byte.
    let from_a = lower + each(0x80 - b'a');
    let past_z = lower + each(0x80 - b'z' - 1);
    let others = !(from_a & !past_z & !word) & HIGH_BITS;
    Some(others.trailing_zeros() as usize / 8)
}

/// Eight times the same byte.
const fn each(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

/// The end of the run of `class` characters that continues at `position`.
#[inline(always)]
pub(super) fn run_end(text: &[u8], mut position: usize, class: Class) -> usize {
    if class == Class::Letter {
        while let Some(letters) = ascii_letters(text, position) {
            position += letters;
            if letters < 8 {
                break;
            }
        }
    }
    while let Some(&byte) = text.get(position) {
        let found = ASCII[usize::from(byte)];
        if found == class as u8 {
            position += 1;
        } else if found == HIGH {
            let next = step_outlined(text, position);
            if next.class != class {
                break;
            }
            position += next.len;
        } else {
            break;
        }
    }
    position
}

/// The end of a run of at most `limit` number characters.
#[inline(always)]
pub(super) fn digits_end(text: &[u8], mut position: usize, limit: usize) -> usize {
    for _ in 0..limit {
        match peek(text, position) {
            Some(next) if next.class == Class::Number => position += next.len,
            _ => break,
        }
    }
    position
}

/// A run of white space.
pub(super) struct SpaceRun {
    /// Where it ends.
    pub end: usize,
    /// Where its last character starts.
    pub last: usize,
    /// After its last `\r` or `\n`.
    pub newline_end: Option<usize>,
}

/// The run of white space that starts at `start` (with at least one character).
#[inline(always)]
pub(super) fn space_run(text: &[u8], start: usize) -> SpaceRun {
    let mut run = SpaceRun {
        end: start,
        last: start,
        newline_end: None,
    };
    while let Some(next) = peek(text, run.end) {
        if next.class != Class::Space {
            break;
        }
        run.last = run.end;
        run.end += next.len;
        if matches!(text[run.last], b'\r' | b'\n') {
            run.newline_end = Some(run.end);
        }
    }
    run
}

/// Call `visit(start, digit, after)` for each number character: the stretch without one before it is `start..digit`, the character is
/// `digit..after`. The stretch behind the last one comes with `digit == after == text.len()`.
#[inline(always)]
pub(super) fn for_each_digit(text: &[u8], mut visit: impl FnMut(usize, usize, usize)) {
    let (mut start, mut position) = (0, 0);
    while let Some(next) = peek(text, position) {
        let after = position + next.len;
        if next.class == Class::Number {
            visit(start, position, after);
            start = after;
        }
        position = after;
    }
    visit(start, text.len(), text.len());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bytes_at_once_are_letters_as_one_by_one() {
        for place in 0..8 {
            for byte in 0..=255u8 {
                for other in [b'a', b'Z', b' ', 0x80, 0xFF] {
                    let mut text = [other; 9];
                    text[..place].fill(b'q');
                    text[place] = byte;
                    let letters = text[..8].iter().take_while(|b| b.is_ascii_alphabetic());
                    assert_eq!(ascii_letters(&text, 0), Some(letters.count()), "{text:?}");
                }
            }
        }
        assert_eq!(ascii_letters(b"seventh", 0), None);
        assert_eq!(ascii_letters(b"eightabc", 1), None);
        assert_eq!(ascii_letters(b"eightabc", 9), None);
    }
}
