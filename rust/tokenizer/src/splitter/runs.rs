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

/// The end of the run of `class` characters that continues at `position`.
#[inline(always)]
pub(super) fn run_end(text: &[u8], mut position: usize, class: Class) -> usize {
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
