//! Tokens, their ids, and the rule by which they merge: everything that decides which ids a text gets.

use std::collections::BTreeMap;

use crate::byte_level::{Alphabet, bytes_in_id_order};
use crate::error::{Result, TokenizerError};
use crate::hashing::FastMap;
use crate::splitter::Pattern;

/// A string that is one token as a whole, whatever the merges say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AddedToken {
    /// The string.
    pub content: String,
    /// Its id.
    pub id: u32,
    /// A special token is found in text only where the caller allows it; any other added token always is.
    pub special: bool,
}

/// Which neighbours merge, and in which order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MergeRule {
    /// The listed pairs of ids, the first one first (Hugging Face, Sennrich et al. 2016). The pair's concatenation must be a token.
    Listed {
        /// (left, right) in order of priority.
        merges: Vec<(u32, u32)>,
        /// A piece that is a token as a whole is not merged but taken.
        ignore_merges: bool,
    },
    /// Any two neighbours whose concatenation is a token, the one with the smallest id first; whole pieces first of all (tiktoken).
    Ranks,
}

/// A vocabulary with its merges and its pattern. Built once, never changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vocabulary {
    pattern: Pattern,
    rule: MergeRule,
    /// Bytes of all tokens, one after the other in order of ids.
    bytes: Vec<u8>,
    /// `starts[id]..starts[id + 1]` in `bytes`; [ids + 1].
    starts: Vec<usize>,
    /// Ascending by id; disjoint from the ordinary tokens.
    added: Vec<AddedToken>,
    byte_ids: [u32; 256],
}

/// What a [`Vocabulary`] is made from.
pub struct Parts {
    /// How text is cut.
    pub pattern: Pattern,
    /// How pieces are merged.
    pub rule: MergeRule,
    /// Ordinary tokens by id; ids may have gaps.
    pub tokens: BTreeMap<u32, Vec<u8>>,
    /// Added tokens, special ones included.
    pub added: Vec<AddedToken>,
}

/// Ids must leave room for tags in tables; no vocabulary comes near.
const MAX_ID: u32 = (1 << 28) - 1;

impl Vocabulary {
    /// Check that the parts fit together.
    ///
    /// # Errors
    /// A byte without a token, two tokens with the same bytes or id, an empty token, a merge that makes no token.
    pub fn new(parts: Parts) -> Result<Self> {
        let Parts {
            pattern,
            rule,
            tokens,
            mut added,
        } = parts;
        added.sort_by_key(|token| token.id);
        let mut all: BTreeMap<u32, &[u8]> = tokens
            .iter()
            .map(|(&id, bytes)| (id, bytes.as_slice()))
            .collect();
        for token in &added {
            if all.insert(token.id, token.content.as_bytes()).is_some() {
                return Err(complaint(format!(
                    "added token {:?} has id {}, which another token has: give each token an id of its own",
                    token.content, token.id
                )));
            }
        }
        check_added(&added)?;
        let Some((&last, _)) = all.last_key_value() else {
            return Err(complaint(
                "the vocabulary is empty: it needs at least the 256 bytes",
            ));
        };
        if last > MAX_ID {
            return Err(complaint(format!(
                "token id {last} is too large: ids go up to {MAX_ID}"
            )));
        }
        if last as usize > 4 * all.len() + 65_536 {
            return Err(complaint(format!(
                "token ids go up to {last} but there are only {} tokens: the vocabulary is damaged",
                all.len()
            )));
        }
        let ids = ids_of_bytes(&tokens)?;
        let mut byte_ids = [0; 256];
        for byte in 0..=255u8 {
            byte_ids[usize::from(byte)] = *ids.get([byte].as_slice()).ok_or_else(|| {
                complaint(format!(
                    "byte 0x{byte:02X} has no token: a byte-level vocabulary has all 256 bytes"
                ))
            })?;
        }
        if let MergeRule::Listed { merges, .. } = &rule {
            check_merges(merges, &tokens, &ids)?;
        }
        let mut bytes = Vec::new();
        let mut starts = vec![0];
        for id in 0..=last {
            bytes.extend_from_slice(all.get(&id).copied().unwrap_or_default());
            starts.push(bytes.len());
        }
        Ok(Self {
            pattern,
            rule,
            bytes,
            starts,
            added,
            byte_ids,
        })
    }

    /// The vocabulary of the 256 bytes: id == byte, no merges, no special tokens.
    ///
    /// # Panics
    /// Never: the parts are known to fit.
    pub fn bytes_only(pattern: Pattern) -> Self {
        let parts = Parts {
            pattern,
            rule: MergeRule::Listed {
                merges: Vec::new(),
                ignore_merges: false,
            },
            tokens: (0..=255u8)
                .map(|byte| (u32::from(byte), vec![byte]))
                .collect(),
            added: Vec::new(),
        };
        Self::new(parts).expect("256 bytes are a vocabulary")
    }

    /// A vocabulary of our own: bytes in `ByteLevel` order, one token per merge, special tokens last.
    ///
    /// # Errors
    /// A special token that is also an ordinary one, is empty, or is given twice.
    pub fn from_merges(
        pattern: Pattern,
        merges: Vec<(u32, u32)>,
        special_tokens: &[String],
    ) -> Result<Self> {
        let mut list: Vec<Vec<u8>> = bytes_in_id_order().iter().map(|&b| vec![b]).collect();
        for &(left, right) in &merges {
            let part = |id: u32| {
                list.get(id as usize).ok_or_else(|| {
                    complaint(format!("merge of token {id}, which no earlier merge makes"))
                })
            };
            let token = [part(left)?.as_slice(), part(right)?.as_slice()].concat();
            list.push(token);
        }
        let alphabet = Alphabet::new();
        for token in special_tokens {
            // In files a special token and an ordinary one with the same string cannot be told apart.
            if alphabet
                .decode(token)
                .is_some_and(|bytes| list.contains(&bytes))
            {
                return Err(TokenizerError::Setting(format!(
                    "special token {token:?} is also an ordinary token of this text: choose a string that text does not contain, \
                     such as \"<|{token}|>\""
                )));
            }
        }
        let first = list.len();
        let added = special_tokens
            .iter()
            .enumerate()
            .map(|(i, content)| AddedToken {
                content: content.clone(),
                id: (first + i) as u32,
                special: true,
            });
        Self::new(Parts {
            pattern,
            added: added.collect(),
            rule: MergeRule::Listed {
                merges,
                ignore_merges: false,
            },
            tokens: (0u32..).zip(list).collect(),
        })
    }

    /// How text is cut into pieces.
    pub fn pattern(&self) -> Pattern {
        self.pattern
    }

    /// How pieces are merged.
    pub fn rule(&self) -> &MergeRule {
        &self.rule
    }

    /// Largest id plus one.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Never true: the bytes are always there.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The id of each byte.
    pub fn byte_ids(&self) -> &[u32; 256] {
        &self.byte_ids
    }

    /// The bytes of a token; `None` for an id that no token has.
    #[inline]
    pub fn token(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let token = &self.bytes[*self.starts.get(id)?..*self.starts.get(id + 1)?];
        // Ids may have gaps (cl100k has); no token is empty.
        (!token.is_empty()).then_some(token)
    }

    /// Added tokens, ascending by id.
    pub fn added(&self) -> &[AddedToken] {
        &self.added
    }

    /// Ids and bytes of the tokens that are not added, ascending by id.
    pub fn ordinary(&self) -> impl Iterator<Item = (u32, &[u8])> {
        (0..self.len() as u32).filter_map(|id| {
            let is_added = self
                .added
                .binary_search_by_key(&id, |token| token.id)
                .is_ok();
            self.token(id)
                .filter(|_| !is_added)
                .map(|bytes| (id, bytes))
        })
    }

    /// Ids of the ordinary tokens by their bytes.
    pub(crate) fn ids(&self) -> FastMap<&[u8], u32> {
        self.ordinary().map(|(id, bytes)| (bytes, id)).collect()
    }

    /// Everything that decides ids, as bytes: equal exactly for equal vocabularies, on every machine and in every version.
    pub fn canonical_bytes(&self) -> Vec<u8> {
        let mut out = b"ingot vocabulary 1\0".to_vec();
        let mut put = |bytes: &[u8]| {
            out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            out.extend_from_slice(bytes);
        };
        put(self.pattern.name().as_bytes());
        match &self.rule {
            MergeRule::Ranks => put(b"ranks"),
            MergeRule::Listed {
                merges,
                ignore_merges,
            } => {
                put(if *ignore_merges {
                    b"listed, whole pieces first"
                } else {
                    b"listed"
                });
                let pairs: Vec<u8> = merges
                    .iter()
                    .flat_map(|&(l, r)| [l.to_le_bytes(), r.to_le_bytes()])
                    .flatten()
                    .collect();
                put(&pairs);
            }
        }
        for id in 0..self.len() as u32 {
            put(self.token(id).unwrap_or_default());
        }
        for token in &self.added {
            put(&token.id.to_le_bytes());
            put(&[u8::from(token.special)]);
        }
        out
    }
}

fn complaint(message: impl Into<String>) -> TokenizerError {
    TokenizerError::Vocabulary(message.into())
}

fn ids_of_bytes(tokens: &BTreeMap<u32, Vec<u8>>) -> Result<FastMap<&[u8], u32>> {
    let mut ids = FastMap::default();
    for (&id, bytes) in tokens {
        if bytes.is_empty() {
            return Err(complaint(format!("token {id} is empty")));
        }
        if let Some(other) = ids.insert(bytes.as_slice(), id) {
            return Err(complaint(format!(
                "tokens {other} and {id} have the same bytes"
            )));
        }
    }
    Ok(ids)
}

fn check_added(added: &[AddedToken]) -> Result<()> {
    let mut contents: Vec<&str> = added.iter().map(|token| token.content.as_str()).collect();
    contents.sort_unstable();
    if contents.first() == Some(&"") {
        return Err(TokenizerError::Setting(
            "a special token is empty: give it at least one character".to_owned(),
        ));
    }
    match contents.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(TokenizerError::Setting(format!(
            "special token {:?} is given twice",
            pair[0]
        ))),
        None => Ok(()),
    }
}

fn check_merges(
    merges: &[(u32, u32)],
    tokens: &BTreeMap<u32, Vec<u8>>,
    ids: &FastMap<&[u8], u32>,
) -> Result<()> {
    let mut joined = Vec::new();
    for (rank, &(left, right)) in merges.iter().enumerate() {
        joined.clear();
        for id in [left, right] {
            let part = tokens.get(&id).ok_or_else(|| {
                complaint(format!(
                    "merge {rank} uses token id {id}, which no token has"
                ))
            })?;
            joined.extend_from_slice(part);
        }
        if !ids.contains_key(joined.as_slice()) {
            return Err(complaint(format!(
                "merge {rank} makes {:?}, which is not in the vocabulary",
                String::from_utf8_lossy(&joined)
            )));
        }
    }
    Ok(())
}
