//! Files that hold vocabularies and ids.

mod atomic;
pub(crate) mod npy;
pub mod tiktoken;
pub mod tokenizer_json;

pub(crate) use atomic::AtomicFile;
