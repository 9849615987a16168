//! Finding added and special tokens in text: leftmost first, and the longest of those that start there.

use crate::vocabulary::AddedToken;

/// A token found in text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    /// Where it starts.
    pub start: usize,
    /// Where it ends.
    pub end: usize,
    /// Its id.
    pub id: u32,
}

/// A set of strings to look for: a trie, entered only at bytes that start one of them.
#[derive(Clone, Debug, Default)]
pub struct Matcher {
    nodes: Vec<Node>,
    /// The first byte of all strings, if they agree on it: most texts do not contain it and are passed at the speed of `memchr`.
    common_first: Option<u8>,
    longest: usize,
}

#[derive(Clone, Debug, Default)]
struct Node {
    /// (byte, node), ascending by byte.
    children: Vec<(u8, usize)>,
    id: Option<u32>,
}

impl Node {
    fn child(&self, byte: u8) -> Option<usize> {
        let index = self
            .children
            .binary_search_by_key(&byte, |&(b, _)| b)
            .ok()?;
        Some(self.children[index].1)
    }
}

/// Stretch of text that is searched for the common first byte at once.
const STRIDE: usize = 4096;

impl Matcher {
    /// Look for these tokens.
    pub fn new<'a>(tokens: impl IntoIterator<Item = &'a AddedToken>) -> Self {
        let mut matcher = Self {
            nodes: vec![Node::default()],
            ..Self::default()
        };
        for token in tokens {
            let mut at = 0;
            for &byte in token.content.as_bytes() {
                at = match matcher.nodes[at].child(byte) {
                    Some(next) => next,
                    None => matcher.add_node(at, byte),
                };
            }
            matcher.nodes[at].id = Some(token.id);
            matcher.longest = matcher.longest.max(token.content.len());
        }
        if let [(byte, _)] = matcher.nodes[0].children[..] {
            matcher.common_first = Some(byte);
        }
        matcher
    }

    fn add_node(&mut self, parent: usize, byte: u8) -> usize {
        let new = self.nodes.len();
        self.nodes.push(Node::default());
        let children = &mut self.nodes[parent].children;
        let index = children.partition_point(|&(b, _)| b < byte);
        children.insert(index, (byte, new));
        new
    }

    /// Whether there is nothing to look for.
    pub fn is_empty(&self) -> bool {
        self.longest == 0
    }

    /// The first token at or after `from`.
    pub fn find(&self, text: &[u8], from: usize) -> Option<Found> {
        if self.is_empty() {
            return None;
        }
        let mut start = from;
        while start < text.len() {
            if let Some(byte) = self.common_first {
                let stride = &text[start..text.len().min(start + STRIDE)];
                if !stride.contains(&byte) {
                    start += stride.len();
                    continue;
                }
                start += stride.iter().position(|&b| b == byte).unwrap_or(0);
            }
            if let Some((end, id)) = self.longest_at(text, start) {
                return Some(Found { start, end, id });
            }
            start += 1;
        }
        None
    }

    /// Whether some string of the set starts before `position` and ends after it.
    pub fn spans(&self, text: &[u8], position: usize) -> bool {
        let first = position.saturating_sub(self.longest.saturating_sub(1));
        (first..position).any(|start| {
            self.longest_at(text, start)
                .is_some_and(|(end, _)| end > position)
        })
    }

    /// The longest string of the set that starts at `start`: its end and id.
    fn longest_at(&self, text: &[u8], start: usize) -> Option<(usize, u32)> {
        let mut at = 0;
        let mut best = None;
        for (offset, &byte) in text[start..].iter().enumerate() {
            let Some(next) = self.nodes[at].child(byte) else {
                break;
            };
            at = next;
            if let Some(id) = self.nodes[at].id {
                best = Some((start + offset + 1, id));
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(contents: &[&str]) -> Matcher {
        let tokens: Vec<AddedToken> = (0u32..)
            .zip(contents)
            .map(|(id, content)| AddedToken {
                content: (*content).to_owned(),
                id,
                special: true,
            })
            .collect();
        Matcher::new(&tokens)
    }

    #[test]
    fn leftmost_then_longest() {
        let matcher = matcher(&["<a>", "<a>b", "a>b<"]);
        let found = matcher.find(b"x<a>b<", 0).unwrap();
        assert_eq!((found.start, found.end, found.id), (1, 5, 1));
        assert_eq!(matcher.find(b"x<a>b<", 2).unwrap().id, 2);
        assert!(matcher.find(b"<a <a", 0).is_none());
    }

    #[test]
    fn found_beyond_a_stride_and_across_its_border() {
        let matcher = matcher(&["<|end|>"]);
        for at in [0, 4090, 4095, 4096, 9000] {
            let mut text = vec![b'x'; at];
            text.extend_from_slice(b"<|end|> tail");
            assert_eq!(matcher.find(&text, 0).unwrap().start, at);
            assert!(matcher.spans(&text, at + 3));
            assert!(!matcher.spans(&text, at));
            assert!(!matcher.spans(&text, at + 7));
        }
    }

    #[test]
    fn an_empty_set_finds_nothing() {
        assert!(matcher(&[]).find(b"anything", 0).is_none());
        assert!(!matcher(&[]).spans(b"anything", 3));
    }
}
