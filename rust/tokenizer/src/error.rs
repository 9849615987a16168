//! What can go wrong, in words for the person who has to fix it.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// The result of everything fallible in this crate.
pub type Result<T> = std::result::Result<T, TokenizerError>;

/// Every error of the tokenizer. Each message names the file, value or option and says what to do.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file is not what its name says, or needs something that is not supported.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// A vocabulary that cannot work, whatever it came from.
    #[error("{0}")]
    Vocabulary(String),
    /// A setting that cannot work.
    #[error("{0}")]
    Setting(String),
    /// Training text that cannot give the vocabulary asked for.
    #[error("{0}")]
    Corpus(String),
    /// An id that no token has.
    #[error("token id {id} at index {index} has no token: ids run from 0 to {}", vocab_size - 1)]
    UnknownId {
        /// The offending id.
        id: i64,
        /// Its index in the input.
        index: usize,
        /// Number of ids of the vocabulary.
        vocab_size: usize,
    },
    /// Text that contains a special token where that is not allowed.
    #[error(
        "the text contains the special token {token:?} at byte {position}: pass allowed_special={{{token:?}}} to encode it as \
         that token, or disallowed_special=() to treat it as ordinary text"
    )]
    DisallowedSpecial {
        /// The token found.
        token: String,
        /// Byte offset in the text.
        position: usize,
    },
    /// The caller's callback asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl TokenizerError {
    /// Attach a path to an error of the operating system.
    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    /// A complaint about the contents of a file.
    pub(crate) fn file(path: &Path, message: impl Into<String>) -> Self {
        Self::File {
            path: path.to_owned(),
            message: message.into(),
        }
    }
}
