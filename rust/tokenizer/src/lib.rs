//! Byte-level byte pair encoding: training, encoding, decoding, and the files of Hugging Face and tiktoken.
//!
//! The rooms, in the order in which text passes through them:
//! - [`splitter`] cuts text into pieces by one of the published patterns, with the tables of [`unicode`];
//! - [`trainer`] counts pieces and learns merges;
//! - [`vocabulary`] holds tokens, ids and merges, and [`files`] reads and writes it;
//! - the encoder merges the bytes of each piece into tokens and remembers pieces it has seen;
//! - [`Tokenizer`] is what callers use.
//!
//! Ids equal those of tiktoken and of Hugging Face's `tokenizers`. Input is bytes: text that is no valid UTF-8 is legal and comes back the same.
#![forbid(unsafe_code)]

pub mod byte_level;
mod encoder;
mod error;
pub mod files;
mod hashing;
mod parallel;
mod piece_key;
pub mod splitter;
mod tokenizer;
pub mod trainer;
pub mod unicode;
pub mod vocabulary;

pub use error::{Result, TokenizerError};
pub use parallel::Tick;
pub use splitter::Pattern;
pub use tokenizer::{FILE_NAME, FileKind, SpecialPolicy, Specials, Tokenizer};
pub use trainer::{PieceCounter, Progress, TrainOptions, train};
pub use vocabulary::Vocabulary;
