//! The tokenizer: a vocabulary and what is built from it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::encoder::{Encoder, Matcher};
use crate::error::{Result, TokenizerError};
use crate::files::{npy::NpyWriter, tiktoken, tokenizer_json};
use crate::parallel::Tick;
use crate::splitter::Pattern;
use crate::trainer::Blocks;
use crate::vocabulary::{AddedToken, MergeRule, Vocabulary};

/// The file in a folder that holds its tokenizer.
pub const FILE_NAME: &str = "tokenizer.json";

/// Bytes of a file that each thread encodes between two writes.
const BLOCK: usize = 4 << 20;

/// Text to ids and back. Immutable; any number of threads may use it at once.
pub struct Tokenizer {
    vocabulary: Vocabulary,
    encoder: Encoder,
    /// Added tokens that are not special: found in any text.
    always: Matcher,
    post_processor: Option<Value>,
}

/// A set of special tokens.
#[derive(Clone, Debug)]
pub enum Specials {
    /// All that the tokenizer has.
    All,
    /// These.
    These(Vec<String>),
}

/// What becomes of special tokens in text, prepared for any number of texts.
pub struct SpecialPolicy {
    /// Tokens to find in text: the allowed special ones, and the added ones that are not special.
    found: Matcher,
    refused: Matcher,
    refused_names: BTreeMap<u32, String>,
}

impl Tokenizer {
    /// A tokenizer with this vocabulary.
    pub fn new(vocabulary: Vocabulary) -> Self {
        Self::with_post_processor(vocabulary, None)
    }

    fn with_post_processor(vocabulary: Vocabulary, post_processor: Option<Value>) -> Self {
        Self {
            encoder: Encoder::new(&vocabulary),
            always: Matcher::new(vocabulary.added().iter().filter(|token| !token.special)),
            vocabulary,
            post_processor,
        }
    }

    /// Read a `tokenizer.json`, or the one in a folder.
    ///
    /// # Errors
    /// No such file, a damaged one, or one that needs what is not supported.
    pub fn from_file(path: &Path) -> Result<Self> {
        let file = if path.is_dir() {
            path.join(FILE_NAME)
        } else {
            path.to_owned()
        };
        let loaded = tokenizer_json::load(&file)?;
        Ok(Self::with_post_processor(
            loaded.vocabulary,
            loaded.post_processor,
        ))
    }

    /// Read the contents of a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`Self::from_file`].
    pub fn from_json(contents: &[u8]) -> Result<Self> {
        let loaded = tokenizer_json::parse(contents)?;
        Ok(Self::with_post_processor(
            loaded.vocabulary,
            loaded.post_processor,
        ))
    }

    /// Read tiktoken's rank file.
    ///
    /// # Errors
    /// No such file, a damaged one, or special tokens that clash with it.
    pub fn from_tiktoken(
        path: &Path,
        pattern: Pattern,
        special_tokens: &[(String, u32)],
    ) -> Result<Self> {
        Ok(Self::new(tiktoken::load(path, pattern, special_tokens)?))
    }

    /// Read the contents of a rank file.
    ///
    /// # Errors
    /// As [`Self::from_tiktoken`].
    pub fn from_ranks(
        contents: &[u8],
        pattern: Pattern,
        special_tokens: &[(String, u32)],
    ) -> Result<Self> {
        Ok(Self::new(tiktoken::parse(
            contents,
            pattern,
            special_tokens,
        )?))
    }

    /// Write `tokenizer.json` into a folder, or to a path that ends in `.json`. Where it was written.
    ///
    /// # Errors
    /// The file cannot be written, or the vocabulary has no form as merges.
    pub fn save(&self, path: &Path) -> Result<PathBuf> {
        let is_file = path
            .extension()
            .is_some_and(|extension| extension == "json");
        let file = if is_file {
            path.to_owned()
        } else {
            path.join(FILE_NAME)
        };
        tokenizer_json::save(&file, &self.vocabulary, self.post_processor.as_ref())?;
        Ok(file)
    }

    /// Write the ordinary tokens as tiktoken's rank file.
    ///
    /// # Errors
    /// The file cannot be written, or tiktoken would give other ids.
    pub fn save_tiktoken(&self, path: &Path) -> Result<()> {
        tiktoken::save(&self.vocabulary, path)
    }

    /// The contents of the tokenizer's own kind of file, from which [`Self::from_json`] or [`Self::from_ranks`] makes it again.
    ///
    /// # Errors
    /// Never for a vocabulary that was loaded or trained.
    pub fn contents(&self) -> Result<(FileKind, Vec<u8>)> {
        match self.vocabulary.rule() {
            MergeRule::Listed { .. } => {
                let text =
                    tokenizer_json::contents(&self.vocabulary, self.post_processor.as_ref())?;
                Ok((FileKind::TokenizerJson, text.into_bytes()))
            }
            MergeRule::Ranks => Ok((FileKind::Tiktoken, tiktoken::contents(&self.vocabulary)?)),
        }
    }

    /// The vocabulary.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// Special tokens and their ids, ascending by id.
    pub fn special_tokens(&self) -> impl Iterator<Item = &AddedToken> {
        self.vocabulary.added().iter().filter(|token| token.special)
    }

    /// Find special tokens as tokens where they are `allowed`; refuse text that contains a `disallowed` one. `All` disallowed means all that
    /// are not allowed. Disallowed strings need not be tokens of the vocabulary.
    pub fn special_policy(&self, allowed: &Specials, disallowed: &Specials) -> SpecialPolicy {
        let is_allowed = |token: &AddedToken| match allowed {
            Specials::All => true,
            Specials::These(names) => names.contains(&token.content),
        };
        let found = self
            .vocabulary
            .added()
            .iter()
            .filter(|token| !token.special || is_allowed(token));
        let refused_names: BTreeMap<u32, String> = match disallowed {
            Specials::All => (0..)
                .zip(
                    self.special_tokens()
                        .filter(|token| !is_allowed(token))
                        .map(|token| token.content.clone()),
                )
                .collect(),
            Specials::These(names) => (0..)
                .zip(names.iter().filter(|name| !name.is_empty()).cloned())
                .collect(),
        };
        let refused: Vec<AddedToken> = refused_names
            .iter()
            .map(|(&id, content)| AddedToken {
                content: content.clone(),
                id,
                special: true,
            })
            .collect();
        SpecialPolicy {
            found: Matcher::new(found),
            refused: Matcher::new(&refused),
            refused_names,
        }
    }

    /// Ids of a text in which special tokens are ordinary text.
    ///
    /// # Errors
    /// `tick` asked to stop.
    pub fn encode_ordinary(&self, text: &[u8], tick: &mut Tick<'_>) -> Result<Vec<u32>> {
        self.encoder.encode(text, &self.always, tick)
    }

    /// Ids of a text.
    ///
    /// # Errors
    /// A disallowed special token, or `tick` asked to stop.
    pub fn encode(
        &self,
        text: &[u8],
        policy: &SpecialPolicy,
        tick: &mut Tick<'_>,
    ) -> Result<Vec<u32>> {
        policy.check(text)?;
        self.encoder.encode(text, &policy.found, tick)
    }

    /// Ids of many texts in a row, and where each text's ids start: [texts + 1]. They do not depend on the number of threads.
    ///
    /// # Errors
    /// A disallowed special token, or `tick` asked to stop.
    pub fn encode_batch(
        &self,
        texts: &[&[u8]],
        policy: &SpecialPolicy,
        threads: usize,
        tick: &mut Tick<'_>,
    ) -> Result<(Vec<u32>, Vec<i64>)> {
        for text in texts {
            policy.check(text)?;
        }
        self.encoder
            .encode_batch(texts, &policy.found, threads, tick)
    }

    /// Encode a file, whose special tokens are ordinary text, into a `.npy` array: `uint16` if the vocabulary fits (up to 65,536 ids),
    /// else `uint32`. Memory stays bounded, and the ids are those of the whole text. Number of ids.
    ///
    /// # Errors
    /// A file cannot be read or written, or `tick` asked to stop.
    pub fn encode_file(
        &self,
        path: &Path,
        output: &Path,
        threads: usize,
        tick: &mut Tick<'_>,
    ) -> Result<u64> {
        let policy =
            self.special_policy(&Specials::These(Vec::new()), &Specials::These(Vec::new()));
        let mut blocks = Blocks::open(path, BLOCK * threads.max(1))?;
        let mut writer = NpyWriter::create(output, self.vocabulary.len())?;
        while let Some(block) =
            blocks.next_block(|text, position| !self.always.spans(text, position))?
        {
            let (ids, _) = self
                .encoder
                .encode_batch(&[block], &policy.found, threads, tick)?;
            writer.append(&ids)?;
            if tick().is_break() {
                return Err(TokenizerError::Interrupted);
            }
        }
        writer.finish()
    }

    /// The bytes behind ids, special tokens included.
    ///
    /// # Errors
    /// An id that no token has; the message names it and its index.
    pub fn decode(&self, ids: impl IntoIterator<Item = i64>) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for (index, id) in ids.into_iter().enumerate() {
            let token = u32::try_from(id)
                .ok()
                .and_then(|id| self.vocabulary.token(id));
            let unknown = || TokenizerError::UnknownId {
                id,
                index,
                vocab_size: self.vocabulary.len(),
            };
            bytes.extend_from_slice(token.ok_or_else(unknown)?);
        }
        Ok(bytes)
    }
}

/// The files a tokenizer can be made from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileKind {
    /// Hugging Face's.
    TokenizerJson,
    /// A rank file; pattern and special tokens are not in it.
    Tiktoken,
}

impl SpecialPolicy {
    fn check(&self, text: &[u8]) -> Result<()> {
        match self.refused.find(text, 0) {
            None => Ok(()),
            Some(found) => Err(TokenizerError::DisallowedSpecial {
                token: self
                    .refused_names
                    .get(&found.id)
                    .cloned()
                    .unwrap_or_default(),
                position: found.start,
            }),
        }
    }
}
