//! `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` (Radford et al. 2019, `encoder.py`).

use super::runs::{peek, run_end, space_run};
use crate::unicode::Class;

/// Where the piece that starts at `start < text.len()` ends.
#[inline(always)]
pub(super) fn piece_end(text: &[u8], start: usize) -> usize {
    let Some(first) = peek(text, start) else {
        return text.len();
    };
    let after = start + first.len;
    if first.class != Class::Space {
        if text[start] == b'\''
            && let Some(len) = contraction(&text[after..])
        {
            return after + len;
        }
        return run_end(text, after, first.class);
    }
    if text[start] == b' '
        && let Some(next) = peek(text, after)
        && next.class != Class::Space
    {
        return run_end(text, after + next.len, next.class);
    }
    // The last white-space character of a run is left for the word behind it; a lone one is a piece.
    let run = space_run(text, start);
    if run.end == text.len() || run.last == start {
        run.end
    } else {
        run.last
    }
}

/// Length of the contraction behind an apostrophe.
#[inline(always)]
fn contraction(rest: &[u8]) -> Option<usize> {
    match rest {
        [b's' | b't' | b'm' | b'd', ..] => Some(1),
        [b'r' | b'v', b'e', ..] | [b'l', b'l', ..] => Some(2),
        _ => None,
    }
}
