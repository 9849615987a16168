//! `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+$|\s*[\r\n]+|\s+(?!\S)|\s+`
//!
//! `\s+$`, with `$` the end of the text, is there when `WHOLE_TAIL`: tiktoken 0.14 has it, Llama 3 and Qwen 2 do not.

use super::runs::{digits_end, peek, run_end, space_run};
use crate::unicode::Class;

/// Where the piece that starts at `start < text.len()` ends.
#[inline(always)]
pub(super) fn piece_end<const DIGITS: usize, const WHOLE_TAIL: bool>(
    text: &[u8],
    start: usize,
) -> usize {
    let Some(first) = peek(text, start) else {
        return text.len();
    };
    let after = start + first.len;
    match first.class {
        Class::Letter => run_end(text, after, Class::Letter),
        Class::Number => digits_end(text, start, DIGITS),
        Class::Other => {
            if text[start] == b'\''
                && let Some(len) = contraction(&text[after..])
            {
                return after + len;
            }
            match peek(text, after) {
                Some(next) if next.class == Class::Letter => {
                    run_end(text, after + next.len, Class::Letter)
                }
                _ => punctuation_end(text, after),
            }
        }
        Class::Space => {
            let newline = matches!(text[start], b'\r' | b'\n');
            match peek(text, after) {
                Some(next) if next.class == Class::Letter && !newline => {
                    return run_end(text, after + next.len, Class::Letter);
                }
                Some(next) if next.class == Class::Other && text[start] == b' ' => {
                    return punctuation_end(text, after + next.len);
                }
                _ => {}
            }
            let run = space_run(text, start);
            let at_end = run.end == text.len();
            match run.newline_end {
                Some(end) if !(WHOLE_TAIL && at_end) => end,
                _ if at_end || run.last == start => run.end,
                _ => run.last,
            }
        }
    }
}

/// The end of `[^\s\p{L}\p{N}]*[\r\n]*` from `position`.
#[inline(always)]
fn punctuation_end(text: &[u8], position: usize) -> usize {
    let mut end = run_end(text, position, Class::Other);
    while matches!(text.get(end), Some(b'\r' | b'\n')) {
        end += 1;
    }
    end
}

/// Length of the contraction behind an apostrophe, in any case. U+017F (long s, bytes C5 BF) folds to s.
#[inline(always)]
fn contraction(rest: &[u8]) -> Option<usize> {
    let lower = |i: usize| rest.get(i).map(u8::to_ascii_lowercase);
    match (lower(0)?, lower(1)) {
        (b's' | b't' | b'm' | b'd', _) => Some(1),
        (b'r' | b'v', Some(b'e')) | (b'l', Some(b'l')) | (0xC5, Some(0xBF)) => Some(2),
        _ => None,
    }
}
