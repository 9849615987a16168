//! Text -> merges: byte pair encoding (Sennrich et al. 2016) over counted pieces.

mod merges;
mod pieces;

use std::ops::ControlFlow;

pub(crate) use pieces::Blocks;
pub use pieces::PieceCounter;

use crate::error::{Result, TokenizerError};
use crate::splitter::Pattern;
use crate::vocabulary::Vocabulary;

/// What to learn.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Number of ids, special tokens included.
    pub vocab_size: usize,
    /// Tokens that text never gives; they take the last ids, in this order.
    pub special_tokens: Vec<String>,
    /// Merge no pair that occurs less often than this.
    pub min_frequency: u64,
}

/// Called now and then with (merges learned, merges wanted); may ask to stop.
pub type Progress<'a> = dyn FnMut(usize, usize) -> ControlFlow<()> + 'a;

impl TrainOptions {
    /// Merges that the vocabulary size asks for.
    ///
    /// # Errors
    /// A size with no room for the 256 bytes and the special tokens.
    pub fn num_merges(&self) -> Result<usize> {
        let fixed = 256 + self.special_tokens.len();
        self.vocab_size.checked_sub(fixed).ok_or_else(|| {
            TokenizerError::Setting(format!(
                "vocab_size {} is too small: 256 bytes and {} special tokens need at least {fixed}",
                self.vocab_size,
                self.special_tokens.len()
            ))
        })
    }
}

/// Learn a vocabulary from counted pieces. The most frequent pair merges first; among equals the one with the smaller left id, then
/// the smaller right id: the rule of Hugging Face's trainer with its `ByteLevel` alphabet.
///
/// # Errors
/// No text, a vocabulary larger than the text can give, special tokens that clash, or an interruption by `progress`.
pub fn train(
    counter: PieceCounter,
    options: &TrainOptions,
    progress: &mut Progress<'_>,
) -> Result<Vocabulary> {
    let wanted = options.num_merges()?;
    let pattern: Pattern = counter.pattern();
    let words = counter.into_words();
    if words.is_empty() {
        return Err(TokenizerError::Corpus(
            "there is no text to learn from: every document is empty".to_owned(),
        ));
    }
    let merges = merges::learn(words, wanted, options.min_frequency, progress)?;
    if merges.len() < wanted {
        let largest = 256 + options.special_tokens.len() + merges.len();
        let frequency = match options.min_frequency {
            0 | 1 => String::new(),
            n => format!(" with min_frequency {n}"),
        };
        return Err(TokenizerError::Corpus(format!(
            "vocab_size {} is more than this text can give{frequency}: only {} merges are possible, so the largest vocab_size is \
             {largest}; lower it or give more text",
            options.vocab_size,
            merges.len()
        )));
    }
    Vocabulary::from_merges(pattern, merges, &options.special_tokens)
}

#[cfg(test)]
mod tests;
