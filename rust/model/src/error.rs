//! Everything that can go wrong in this crate, said once and with the values that matter.

use thiserror::Error;

/// An error of the network, its inputs or its optimizer.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A field of the configuration, or two of them together, make no network.
    #[error("model configuration: {0}")]
    Config(String),
    /// The instruction level asked for is not one that this machine has.
    #[error("level {level} is not available on this machine; available: {available}")]
    LevelUnavailable {
        /// Name of the level asked for.
        level: &'static str,
        /// Names of the levels that the machine has, separated by commas.
        available: String,
    },
    /// An argument has a wrong length or a value that makes no sense.
    #[error("{argument}: {message}")]
    Argument {
        /// Name of the argument.
        argument: &'static str,
        /// What is wrong with it, with the numbers.
        message: String,
    },
    /// An index (token id, target, row) lies outside its range.
    #[error("{argument}[{position}] is {value}, outside {low}..{high} ({what})")]
    OutOfRange {
        /// Name of the argument.
        argument: &'static str,
        /// Index of the offending entry.
        position: usize,
        /// The entry.
        value: i64,
        /// Smallest legal value.
        low: i64,
        /// One above the largest legal value.
        high: i64,
        /// What the range is, in words.
        what: &'static str,
    },
    /// A sequence is longer than learned positions reach.
    #[error(
        "sequence {sequence} has {length} tokens, but the learned positions end at max_position_embeddings = {maximum}: \
         cut the sequence or train a model with more positions"
    )]
    SequenceTooLong {
        /// Index of the sequence in the batch.
        sequence: usize,
        /// Its number of tokens.
        length: usize,
        /// Number of learned positions.
        maximum: usize,
    },
    /// Backward was called twice on one context.
    #[error("this context was already used by a backward pass: run forward again")]
    ContextSpent,
    /// The parameters changed between forward and backward.
    #[error(
        "the parameters changed after this context was made (by a step or a write): run forward again"
    )]
    ContextStale,
    /// The context was made by another model.
    #[error("this context belongs to another model")]
    ContextForeign,
    /// The parameters changed after the decoder was made.
    #[error(
        "the parameters changed after this decoder was made (by a step or a write): make a new one"
    )]
    DecoderStale,
    /// The decoder was made by another model.
    #[error("this decoder belongs to another model")]
    DecoderForeign,
    /// A token cannot be drawn.
    #[error(
        "the logits of sequence {sequence_id} are not finite numbers: the model's weights are damaged or diverged"
    )]
    NotFinite {
        /// Identity of the sequence.
        sequence_id: i64,
    },
    /// A step was asked for before any gradient exists.
    #[error("there are no gradients yet: run backward or forward_backward before the step")]
    NoGradients,
    /// A parameter name that the model does not have.
    #[error("unknown parameter {name:?}; the nearest name is {nearest:?}")]
    UnknownParameter {
        /// The name asked for.
        name: String,
        /// The model's name that is most like it.
        nearest: String,
    },
    /// A parameter is in two optimizer groups.
    #[error(
        "parameter {name:?} is in two optimizer groups ({first} and {second}): each may be in one only"
    )]
    DuplicateParameter {
        /// The parameter.
        name: String,
        /// Index of the first group that has it.
        first: usize,
        /// Index of the second group that has it.
        second: usize,
    },
    /// The optimizer was made for another model.
    #[error("the optimizer was made for a model of {expected} parameters, this one has {got}")]
    OptimizerMismatch {
        /// Number of parameters that the optimizer was made for.
        expected: usize,
        /// Number of parameters of the model given.
        got: usize,
    },
}

impl ModelError {
    pub(crate) fn argument(argument: &'static str, message: impl Into<String>) -> Self {
        Self::Argument {
            argument,
            message: message.into(),
        }
    }

    /// Checks that an argument has as many entries as expected.
    pub(crate) fn check_length(
        argument: &'static str,
        got: usize,
        expected: usize,
        of: &str,
    ) -> Result<(), Self> {
        if got == expected {
            Ok(())
        } else {
            Err(Self::argument(
                argument,
                format!("has {got} entries, but {of} needs {expected}"),
            ))
        }
    }
}
