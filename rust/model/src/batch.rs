//! What goes into a forward pass and what comes out, with the checks of the former.

use std::ops::Range;

use crate::{Config, ModelError, PositionKind};

/// Several sequences one after the other in flat arrays, without padding.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Token ids, `[N]`.
    pub tokens: &'a [i32],
    /// Sequence s is `tokens[offsets[s]..offsets[s + 1]]`; `[S + 1]`, starts at 0, never decreases, ends at N.
    pub offsets: &'a [i64],
    /// The token to be scored after each position, -1 for none; `[N]`.
    pub targets: &'a [i32],
    /// Identities of the sequences, `[S]`: they key the dropout masks. The index in the batch unless given.
    pub sequence_ids: Option<&'a [i64]>,
}

/// Which outputs are computed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(clippy::struct_excessive_bools)] // A set of independent flags with names.
pub struct Want {
    /// ln p(target).
    pub logprobs: bool,
    /// Entropy of the next-token distribution, nats.
    pub entropy: bool,
    /// ln sum exp of the scaled logits.
    pub lse: bool,
    /// Mean of the scaled logits over the vocabulary.
    pub zbar: bool,
    /// Whether the target is the most likely token.
    pub top1: bool,
    /// Scalar heads.
    pub values: bool,
    /// Rows of the final norm's output.
    pub hidden: bool,
    /// ln p(candidate) of each row's candidates.
    pub candidate_logprobs: bool,
}

impl Want {
    /// Log-probabilities alone.
    pub const LOGPROBS: Self = Self {
        logprobs: true,
        entropy: false,
        lse: false,
        zbar: false,
        top1: false,
        values: false,
        hidden: false,
        candidate_logprobs: false,
    };

    /// Whether any output needs the logits.
    pub(crate) fn needs_logits(self) -> bool {
        self.logprobs
            || self.entropy
            || self.lse
            || self.zbar
            || self.top1
            || self.candidate_logprobs
    }
}

/// Token ids for each row of a batch, whose log-probabilities are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Candidates<'a> {
    /// Row t has `ids[offsets[t]..offsets[t + 1]]`; `[N + 1]`, starts at 0, never decreases, ends with the number of ids.
    pub offsets: &'a [i64],
    /// `[C]`; the same id may come several times in a row.
    pub ids: &'a [i32],
}

/// How a forward pass is done.
#[derive(Clone, Copy, Debug)]
pub struct ForwardOptions<'a> {
    /// Which outputs are computed.
    pub want: Want,
    /// Rows whose scalar heads are computed, `[N]`; all of them unless given.
    pub value_rows: Option<&'a [bool]>,
    /// Rows of the final norm's output to return, in this order; a row may come several times.
    pub hidden_rows: Option<&'a [i64]>,
    /// Ids whose log-probabilities are computed, in rows with a target or without.
    pub candidates: Option<Candidates<'a>>,
    /// Logits are divided by this; positive.
    pub temperature: f32,
    /// Token ids that can never be chosen: their probability is 0.
    pub banned_ids: &'a [i32],
    /// Whether a backward pass may follow and dropout is on.
    pub train: bool,
    /// Seed of the dropout masks.
    pub seed: u64,
    /// The adapter that the pass goes through, whose gradients its backward pass adds to; none for the model as it is.
    pub adapter: Option<usize>,
}

impl Default for ForwardOptions<'_> {
    fn default() -> Self {
        Self {
            want: Want::LOGPROBS,
            value_rows: None,
            hidden_rows: None,
            candidates: None,
            temperature: 1.0,
            banned_ids: &[],
            train: true,
            seed: 0,
            adapter: None,
        }
    }
}

/// Results of a forward pass; `None` where not asked for, 0 in rows that were not asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outputs {
    /// ln p(target), `[N]`.
    pub logprobs: Option<Vec<f32>>,
    /// Entropy of the next-token distribution in nats, `[N]`.
    pub entropy: Option<Vec<f32>>,
    /// ln sum exp of the scaled logits, `[N]`.
    pub lse: Option<Vec<f32>>,
    /// Mean scaled logit, `[N]`.
    pub zbar: Option<Vec<f32>>,
    /// Whether the target is the most likely token, `[N]`.
    pub top1: Option<Vec<bool>>,
    /// Scalar heads, `[N, num_values]`.
    pub values: Option<Vec<f32>>,
    /// Final norm's output at `hidden_rows`, `[R, hidden_size]`.
    pub hidden: Option<Vec<f32>>,
    /// ln p of the candidates, `[C]`.
    pub candidate_logprobs: Option<Vec<f32>>,
}

/// Gradients of a scalar with respect to the outputs. `None` is 0; entries of rows without the output are ignored.
#[derive(Clone, Copy, Debug, Default)]
pub struct OutputGradients<'a> {
    /// `[N]`.
    pub d_logprobs: Option<&'a [f32]>,
    /// `[N]`.
    pub d_entropy: Option<&'a [f32]>,
    /// `[N]`.
    pub d_lse: Option<&'a [f32]>,
    /// `[N]`.
    pub d_zbar: Option<&'a [f32]>,
    /// `[N, num_values]`.
    pub d_values: Option<&'a [f32]>,
    /// `[R, hidden_size]`.
    pub d_hidden: Option<&'a [f32]>,
    /// `[C]`.
    pub d_candidates: Option<&'a [f32]>,
}

/// A checked batch in the form that the layers use.
#[derive(Clone, Debug)]
pub(crate) struct Packing {
    pub(crate) tokens: Vec<u32>,
    pub(crate) offsets: Vec<i64>,
    pub(crate) sequence_ids: Vec<i64>,
    /// Position of each token in its sequence, `[N]`.
    pub(crate) positions: Vec<u32>,
    /// Identity of each token's sequence, `[N]`.
    pub(crate) row_sequence_ids: Vec<i64>,
    /// -1 for none, `[N]`.
    pub(crate) targets: Vec<i32>,
    /// Length of the longest sequence.
    pub(crate) longest: usize,
}

impl Packing {
    pub(crate) fn new(batch: &Batch<'_>, config: &Config) -> Result<Self, ModelError> {
        let num_rows = batch.tokens.len();
        if num_rows > i32::MAX as usize {
            return Err(ModelError::argument(
                "tokens",
                format!("has {num_rows} entries; at most 2^31 - 1 fit in a batch"),
            ));
        }
        check_offsets(
            "offsets",
            batch.offsets,
            num_rows,
            ("sequences", "the number of tokens"),
        )?;
        ModelError::check_length(
            "targets",
            batch.targets.len(),
            num_rows,
            "a batch of that many tokens",
        )?;
        check_ids("tokens", batch.tokens, 0, config.vocab_size)?;
        check_ids("targets", batch.targets, -1, config.vocab_size)?;
        let num_sequences = batch.offsets.len() - 1;
        let sequence_ids = match batch.sequence_ids {
            Some(ids) => {
                ModelError::check_length(
                    "sequence_ids",
                    ids.len(),
                    num_sequences,
                    "a batch of that many sequences",
                )?;
                ids.to_vec()
            }
            None => (0..num_sequences as i64).collect(),
        };
        let mut positions = Vec::with_capacity(num_rows);
        let mut row_sequence_ids = Vec::with_capacity(num_rows);
        let mut longest = 0;
        for (sequence, (window, &id)) in batch.offsets.windows(2).zip(&sequence_ids).enumerate() {
            let length = (window[1] - window[0]) as usize;
            if config.position == PositionKind::Learned && length > config.max_position_embeddings {
                return Err(ModelError::SequenceTooLong {
                    sequence,
                    length,
                    maximum: config.max_position_embeddings,
                });
            }
            longest = longest.max(length);
            positions.extend(0..length as u32);
            row_sequence_ids.extend(std::iter::repeat_n(id, length));
        }
        Ok(Self {
            tokens: batch.tokens.iter().map(|&token| token as u32).collect(),
            offsets: batch.offsets.to_vec(),
            sequence_ids,
            positions,
            row_sequence_ids,
            targets: batch.targets.to_vec(),
            longest,
        })
    }

    pub(crate) fn num_rows(&self) -> usize {
        self.tokens.len()
    }
}

/// Offsets must cut `total` entries into runs; `parts` and `entries` are what messages call those.
fn check_offsets(
    argument: &'static str,
    offsets: &[i64],
    total: usize,
    (parts, entries): (&str, &str),
) -> Result<(), ModelError> {
    if offsets.is_empty() {
        return Err(ModelError::argument(
            argument,
            format!("is empty, but needs one entry more than there are {parts}"),
        ));
    }
    if offsets[0] != 0 {
        return Err(ModelError::argument(
            argument,
            format!("starts with {}, but must start with 0", offsets[0]),
        ));
    }
    if let Some(i) = offsets.windows(2).position(|pair| pair[1] < pair[0]) {
        let (before, after) = (offsets[i], offsets[i + 1]);
        let message = format!("decreases from {before} to {after} at index {}", i + 1);
        return Err(ModelError::argument(argument, message));
    }
    let last = offsets[offsets.len() - 1];
    if last != total as i64 {
        let message = format!("ends with {last}, but must end with {entries}, {total}");
        return Err(ModelError::argument(argument, message));
    }
    Ok(())
}

pub(crate) fn check_ids(
    argument: &'static str,
    ids: &[i32],
    low: i32,
    vocab_size: usize,
) -> Result<(), ModelError> {
    match ids
        .iter()
        .position(|&id| id < low || i64::from(id) >= vocab_size as i64)
    {
        None => Ok(()),
        Some(position) => Err(ModelError::OutOfRange {
            argument,
            position,
            value: i64::from(ids[position]),
            low: i64::from(low),
            high: vocab_size as i64,
            what: if low < 0 {
                "-1 for none, else below vocab_size"
            } else {
                "token ids below vocab_size"
            },
        }),
    }
}

/// The checked options of the head.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeadOptions {
    pub(crate) want: Want,
    /// Rows whose logits are computed, ascending: those with a target, and those with candidates where these are wanted.
    pub(crate) rows: Vec<usize>,
    /// The targets of those rows, -1 for none.
    pub(crate) targets: Vec<i32>,
    /// Row t of the batch has `candidates[candidate_offsets[t]..candidate_offsets[t + 1]]`; empty unless wanted.
    pub(crate) candidate_offsets: Vec<usize>,
    pub(crate) candidates: Vec<i32>,
    /// Number of scalar heads.
    pub(crate) num_values: usize,
    /// Rows whose scalar heads are computed, ascending.
    pub(crate) value_rows: Vec<usize>,
    pub(crate) hidden_rows: Vec<usize>,
    pub(crate) temperature: f32,
    /// Ascending, each once.
    pub(crate) banned_ids: Vec<i32>,
}

impl HeadOptions {
    /// Where the candidates of a row of the batch lie among all of them.
    pub(crate) fn candidates_of(&self, row: usize) -> Range<usize> {
        if self.candidates.is_empty() {
            return 0..0;
        }
        self.candidate_offsets[row]..self.candidate_offsets[row + 1]
    }

    pub(crate) fn new(
        options: &ForwardOptions<'_>,
        packing: &Packing,
        config: &Config,
        num_values: usize,
    ) -> Result<Self, ModelError> {
        let num_rows = packing.num_rows();
        if !(options.temperature > 0.0 && options.temperature.is_finite()) {
            let message = format!("must be a positive number, got {}", options.temperature);
            return Err(ModelError::argument("temperature", message));
        }
        if options.want.values && num_values == 0 {
            let message = "was asked for, but the model has no scalar heads: make it with num_values of at least 1";
            return Err(ModelError::argument("values", message));
        }
        let value_rows = match options.value_rows {
            _ if !options.want.values => Vec::new(),
            None => (0..num_rows).collect(),
            Some(rows) => {
                ModelError::check_length(
                    "value_rows",
                    rows.len(),
                    num_rows,
                    "a batch of that many tokens",
                )?;
                (0..num_rows).filter(|&row| rows[row]).collect()
            }
        };
        let hidden_rows = match options.hidden_rows {
            _ if !options.want.hidden => Vec::new(),
            None => (0..num_rows).collect(),
            Some(rows) => {
                if let Some(position) = rows
                    .iter()
                    .position(|&row| row < 0 || row >= num_rows as i64)
                {
                    return Err(ModelError::OutOfRange {
                        argument: "hidden_rows",
                        position,
                        value: rows[position],
                        low: 0,
                        high: num_rows as i64,
                        what: "rows of the batch",
                    });
                }
                rows.iter().map(|&row| row as usize).collect()
            }
        };
        let banned_ids = check_banned(options.banned_ids, config.vocab_size)?;
        let is_banned = |id: &i32| banned_ids.binary_search(id).is_ok();
        if let Some(row) = packing.targets.iter().position(is_banned) {
            let message = format!("{} at row {row} is one of banned_ids", packing.targets[row]);
            return Err(ModelError::argument("targets", message));
        }
        let (candidate_offsets, candidates) = match options.candidates {
            _ if !options.want.candidate_logprobs => Default::default(),
            None => {
                let message = "candidate_logprobs were asked for, but no candidates given";
                return Err(ModelError::argument("candidates", message));
            }
            Some(given) => check_candidates(given, num_rows, config.vocab_size)?,
        };
        if let Some(i) = candidates.iter().position(is_banned) {
            let row = candidate_offsets.partition_point(|&start| start <= i) - 1;
            let message = format!("{} at row {row} is one of banned_ids", candidates[i]);
            return Err(ModelError::argument("candidates", message));
        }
        let has_candidates = |row: usize| {
            !candidates.is_empty() && candidate_offsets[row] < candidate_offsets[row + 1]
        };
        let rows: Vec<usize> = (0..num_rows)
            .filter(|&row| packing.targets[row] >= 0 || has_candidates(row))
            .collect();
        Ok(Self {
            want: options.want,
            targets: rows.iter().map(|&row| packing.targets[row]).collect(),
            rows,
            candidate_offsets,
            candidates,
            num_values,
            value_rows,
            hidden_rows,
            temperature: options.temperature,
            banned_ids,
        })
    }
}

fn check_candidates(
    given: Candidates<'_>,
    num_rows: usize,
    vocab_size: usize,
) -> Result<(Vec<usize>, Vec<i32>), ModelError> {
    ModelError::check_length(
        "candidate offsets",
        given.offsets.len(),
        num_rows + 1,
        "a batch of one token less",
    )?;
    check_offsets(
        "candidate offsets",
        given.offsets,
        given.ids.len(),
        ("tokens", "the number of candidates"),
    )?;
    check_ids("candidates", given.ids, 0, vocab_size)?;
    let offsets = given.offsets.iter().map(|&offset| offset as usize);
    Ok((offsets.collect(), given.ids.to_vec()))
}

/// Sorted and without repetitions; at least one id must remain allowed.
pub(crate) fn check_banned(banned_ids: &[i32], vocab_size: usize) -> Result<Vec<i32>, ModelError> {
    check_ids("banned_ids", banned_ids, 0, vocab_size)?;
    let mut sorted = banned_ids.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    if sorted.len() == vocab_size {
        return Err(ModelError::argument(
            "banned_ids",
            "names the whole vocabulary: no token could be chosen",
        ));
    }
    Ok(sorted)
}
