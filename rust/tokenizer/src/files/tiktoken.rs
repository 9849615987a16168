//! tiktoken's rank files: a line per token, its bytes in base64 and its rank, which is its id. Special tokens are not in the file.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::AtomicFile;
use crate::encoder::merges_of_ranks;
use crate::error::{Result, TokenizerError};
use crate::splitter::Pattern;
use crate::vocabulary::{AddedToken, MergeRule, Parts, Vocabulary};

/// Read a rank file.
///
/// tiktoken merges any two neighbours whose concatenation is a token. Where each token is made by one merge of two earlier tokens (so
/// in GPT-2's, cl100k's, and any vocabulary that was trained), that gives the same ids as listing these merges, and the vocabulary is kept
/// in that form, which can be written as a `tokenizer.json`. Why: take two neighbours `l`, `r` whose concatenation is the token `t`, at
/// the moment when all earlier merges are done. No merge has crossed their outer borders, so between these the text went the way that `t`
/// goes alone, which ends in the one listed pair of `t`: so `(l, r)` is that pair. Otherwise tiktoken's rule itself is kept.
///
/// # Errors
/// The file cannot be read, a line is broken, or the tokens are no byte-level vocabulary.
pub fn load(path: &Path, pattern: Pattern, special_tokens: &[(String, u32)]) -> Result<Vocabulary> {
    let text = fs::read(path).map_err(|error| TokenizerError::io(path, error))?;
    parse(&text, pattern, special_tokens).map_err(|error| match error {
        TokenizerError::Vocabulary(message) => TokenizerError::file(path, message),
        other => other,
    })
}

/// Read the contents of a rank file; see [`load`].
///
/// # Errors
/// As [`load`], but without a path in the message.
pub fn parse(
    contents: &[u8],
    pattern: Pattern,
    special_tokens: &[(String, u32)],
) -> Result<Vocabulary> {
    let mut tokens = BTreeMap::new();
    for (number, line) in contents.split(|&byte| byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let (token, rank) = parse_line(line).ok_or_else(|| {
            TokenizerError::Vocabulary(format!(
                "line {} is not a base64 token and its rank: this is no tiktoken file, or it is damaged",
                number + 1
            ))
        })?;
        if tokens.insert(rank, token).is_some() {
            return Err(TokenizerError::Vocabulary(format!(
                "line {}: rank {rank} is given twice",
                number + 1
            )));
        }
    }
    let added = special_tokens.iter().map(|(content, id)| AddedToken {
        content: content.clone(),
        id: *id,
        special: true,
    });
    let parts = |rule| Parts {
        pattern,
        rule,
        tokens: tokens.clone(),
        added: added.clone().collect(),
    };
    let ranked = Vocabulary::new(parts(MergeRule::Ranks))?;
    match merges_of_ranks(&ranked) {
        None => Ok(ranked),
        Some(merges) => Vocabulary::new(parts(MergeRule::Listed {
            merges,
            ignore_merges: false,
        })),
    }
}

fn parse_line(line: &[u8]) -> Option<(Vec<u8>, u32)> {
    let mut fields = line.split(|&byte| byte == b' ');
    let (token, rank) = (fields.next()?, fields.next()?);
    let rank = std::str::from_utf8(rank).ok()?.parse().ok()?;
    let token = STANDARD.decode(token).ok()?;
    fields.next().is_none().then_some((token, rank))
}

/// The ordinary tokens as a rank file.
///
/// # Errors
/// A vocabulary whose merges tiktoken would do otherwise, because a token's id is not the rank of the merge that makes it.
pub fn contents(vocabulary: &Vocabulary) -> Result<Vec<u8>> {
    if let MergeRule::Listed { merges, .. } = vocabulary.rule() {
        let by_id = merges_of_ranks(vocabulary);
        if by_id.as_ref() != Some(merges) {
            return Err(TokenizerError::Vocabulary(
                "this vocabulary cannot be a tiktoken file: its ids do not follow the order of its merges, so tiktoken would give \
                 other ids; keep tokenizer.json"
                    .to_owned(),
            ));
        }
    }
    let mut out = Vec::new();
    for (id, token) in vocabulary.ordinary() {
        out.extend_from_slice(STANDARD.encode(token).as_bytes());
        out.extend_from_slice(format!(" {id}\n").as_bytes());
    }
    Ok(out)
}

/// Write a rank file; see [`contents`].
///
/// # Errors
/// As [`contents`], or the file cannot be written.
pub fn save(vocabulary: &Vocabulary, path: &Path) -> Result<()> {
    AtomicFile::write(path, &contents(vocabulary)?)
}
