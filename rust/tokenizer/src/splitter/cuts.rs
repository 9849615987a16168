//! Where a long text may be cut in two so that both parts together have the pieces of the whole.
//!
//! In every pattern a letter or number followed by anything else ends a piece: no alternative goes on from one into the other, and no
//! look-ahead sees past white space. The machines keep no state between pieces, so the right part is cut as it would be in the whole.

use crate::unicode::{Class, last_class, step};

/// The last position in `1..=limit` where `text` may be cut and that `allowed` accepts. A position whose next character may be
/// incomplete because `text` ends there is not used.
pub fn last_cut(
    text: &[u8],
    limit: usize,
    mut allowed: impl FnMut(usize) -> bool,
) -> Option<usize> {
    let limit = limit.min(text.len().saturating_sub(1));
    (1..=limit)
        .rev()
        .find(|&position| is_cut(text, position) && allowed(position))
}

fn is_cut(text: &[u8], position: usize) -> bool {
    let is_word = |class| matches!(class, Class::Letter | Class::Number);
    let rest = &text[position..];
    let next = step(rest);
    let complete = rest[0] < 0x80 || next.len > 1 || rest.len() >= 4;
    // A continuation byte inside a character is no place to look at.
    complete
        && (rest[0] < 0x80 || rest[0] >= 0xC0)
        && !is_word(next.class)
        && last_class(&text[..position]).is_some_and(is_word)
}

/// Parts of about `size` bytes of a whole text, none of them empty, that can be split into pieces independently.
pub struct Cuts<'a, F> {
    text: &'a [u8],
    size: usize,
    allowed: F,
}

impl<'a, F: FnMut(&'a [u8], usize) -> bool> Cuts<'a, F> {
    /// Parts of `text`; `allowed(rest, position)` may refuse a cut.
    pub fn new(text: &'a [u8], size: usize, allowed: F) -> Self {
        Self {
            text,
            size: size.max(1),
            allowed,
        }
    }
}

impl<'a, F: FnMut(&'a [u8], usize) -> bool> Iterator for Cuts<'a, F> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let text = self.text;
        if text.is_empty() {
            return None;
        }
        let mut end = text.len();
        let mut limit = self.size;
        // Without a cut in the first `size` bytes look twice as far: the work stays linear.
        while limit < text.len() {
            if let Some(cut) = last_cut(text, limit, |position| (self.allowed)(text, position)) {
                end = cut;
                break;
            }
            limit *= 2;
        }
        let (part, rest) = text.split_at(end);
        self.text = rest;
        Some(part)
    }
}
