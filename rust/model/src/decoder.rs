//! Writing sequences token by token, many at once.
//!
//! A slot's tokens are read lazily: a step first feeds what each sequence has gained since the last one (a whole prompt,
//! or the one token drawn before) through the blocks, in chunks of rows from all sequences together, then draws from the
//! logits of each sequence's last row. So prompts and single tokens share products, the last token of a sequence that is
//! removed is never read, and a fork needs no logits of its own.
//!
//! The arithmetic is the training pass's: the same layers on rows, and attention on pages whose tiles are those of
//! training. A token's log-probability here has the bits it has there.

use std::ops::Range;

use ingot_kernels::random::{RandomKey, site};
use ingot_kernels::{Mat, MatMut, PagedSequence};

use crate::batch::{HeadOptions, check_banned};
use crate::head::{row_statistics, rows_per_chunk};
use crate::kv_cache::{NewRows, PageStore, PageTable};
use crate::{Model, ModelError, PositionKind, Sampling, Want};

/// Most rows that go through the blocks at once.
const CHUNK_ROWS: usize = 1024;

/// Room and settings of a decoder.
#[derive(Clone, Debug)]
pub struct DecoderOptions<'a> {
    /// Most tokens of a sequence, its prompt included.
    pub max_tokens: usize,
    /// Most sequences at a time.
    pub max_sequences: usize,
    /// Seed of the draws.
    pub seed: u64,
    /// Ids that are never drawn.
    pub banned_ids: &'a [i32],
}

/// One token for each active slot, slots ascending.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DecodeStep {
    /// Slots.
    pub slots: Vec<usize>,
    /// Tokens drawn, or forced.
    pub tokens: Vec<i32>,
    /// Their log-probabilities under the full softmax at the slot's temperature, banned ids masked.
    pub logprobs: Vec<f32>,
    /// Entropy of that softmax, nats.
    pub entropy: Vec<f32>,
}

/// A sequence being written.
struct Slot {
    sequence_id: i64,
    sampling: Sampling,
    /// The head at the slot's temperature.
    head: HeadOptions,
    tokens: Vec<i32>,
    /// Tokens whose keys and values are in the pages.
    num_cached: usize,
    pages: PageTable,
}

/// Some tokens of one slot that go through the blocks together.
struct Segment {
    slot: usize,
    /// Positions in the slot's sequence.
    positions: Range<usize>,
    /// Where the last of them is the sequence's last: the row of the array of last rows that gets it.
    last: Option<usize>,
}

/// What is drawn from one row of logits.
struct Draw<'a> {
    slot: &'a Slot,
    forced: Option<i32>,
    result: Option<(i32, f32, f32)>,
}

/// Sequences being written by one model. Serves only the parameters that the model had when it was made.
pub struct Decoder {
    model: u64,
    version: u64,
    max_tokens: usize,
    seed: u64,
    banned_ids: Vec<i32>,
    store: PageStore,
    slots: Vec<Option<Slot>>,
}

impl Decoder {
    /// A decoder without sequences.
    ///
    /// # Errors
    /// If there is no room for a sequence, `max_tokens` is beyond learned positions, or `banned_ids` are no ids.
    pub fn new(model: &Model, options: &DecoderOptions<'_>) -> Result<Self, ModelError> {
        let config = model.config();
        if options.max_tokens == 0 || options.max_sequences == 0 {
            let argument = if options.max_tokens == 0 { "max_tokens" } else { "max_sequences" };
            return Err(ModelError::argument(argument, "must be at least 1, got 0"));
        }
        if config.position == PositionKind::Learned && options.max_tokens > config.max_position_embeddings {
            let message = format!(
                "{} is beyond the {} positions that the model has learned",
                options.max_tokens, config.max_position_embeddings
            );
            return Err(ModelError::argument("max_tokens", message));
        }
        Ok(Self {
            model: model.id(),
            version: model.version(),
            max_tokens: options.max_tokens,
            seed: options.seed,
            banned_ids: check_banned(options.banned_ids, config.vocab_size)?,
            store: PageStore::new(model.layout().blocks[0].attention.shape(), config.num_hidden_layers),
            slots: (0..options.max_sequences).map(|_| None).collect(),
        })
    }

    /// Begins a sequence with a prompt and returns its slot, the lowest that is free. The prompt is read by the next
    /// step or fork.
    ///
    /// # Errors
    /// If the prompt is empty, has something else than ids, leaves no room for a token, or all slots are in use.
    pub fn add(
        &mut self,
        model: &Model,
        tokens: &[i32],
        sequence_id: i64,
        sampling: Sampling,
    ) -> Result<usize, ModelError> {
        self.check_model(model)?;
        sampling.validate()?;
        if tokens.is_empty() {
            return Err(ModelError::argument("tokens", "is empty: a sequence begins with at least one token"));
        }
        if tokens.len() >= self.max_tokens {
            let message = format!(
                "has {} entries, which leaves no room for another token: the decoder was made for max_tokens = {}",
                tokens.len(),
                self.max_tokens
            );
            return Err(ModelError::argument("tokens", message));
        }
        check_ids("tokens", tokens, 0, model.config().vocab_size)?;
        let head = HeadOptions {
            want: Want::LOGPROBS,
            value_rows: Vec::new(),
            hidden_rows: Vec::new(),
            temperature: sampling.divisor(),
            banned_ids: self.banned_ids.clone(),
        };
        let tokens = tokens.to_vec();
        let pages = PageTable::default();
        self.occupy(Slot { sequence_id, sampling, head, tokens, num_cached: 0, pages })
    }

    /// Begins a second sequence that is so far the same as `slot`'s, and shares its pages.
    ///
    /// # Errors
    /// If the slot is not in use, or all slots are.
    pub fn fork(&mut self, model: &Model, slot: usize, sequence_id: i64) -> Result<usize, ModelError> {
        self.check_model(model)?;
        let unread = self.slot(slot)?.tokens.len() - 1;
        self.free_slot()?;
        // Both read the last token themselves, for its logits; what is before it is read once.
        self.feed(model, &[slot], |slot| slot.num_cached..unread.max(slot.num_cached), &mut []);
        let original = self.slot_mut(slot)?;
        original.num_cached = original.num_cached.max(unread);
        let copy = Slot {
            sequence_id,
            sampling: original.sampling,
            head: original.head.clone(),
            tokens: original.tokens.clone(),
            num_cached: original.num_cached,
            pages: original.pages.clone(),
        };
        self.occupy(copy)
    }

    /// Draws a token for each active slot, or takes the one that `forced` has for it, and appends it.
    ///
    /// # Errors
    /// If a slot in `forced` is not in use or its token no allowed id, a sequence is full, or the logits are not finite;
    /// no sequence has changed then.
    pub fn step(&mut self, model: &Model, forced: &[(usize, i32)]) -> Result<DecodeStep, ModelError> {
        self.check_model(model)?;
        let active = self.active();
        let mut choices: Vec<Option<i32>> = vec![None; self.slots.len()];
        for &(slot, token) in forced {
            self.slot(slot)?;
            check_ids("forced", &[token], slot, model.config().vocab_size)?;
            if self.banned_ids.binary_search(&token).is_ok() {
                let message = format!("{token} for slot {slot} is one of banned_ids");
                return Err(ModelError::argument("forced", message));
            }
            choices[slot] = Some(token);
        }
        for &slot in &active {
            if self.slot(slot)?.tokens.len() >= self.max_tokens {
                let message = format!(
                    "{slot} is full with max_tokens = {} tokens: remove it, or make a larger decoder",
                    self.max_tokens
                );
                return Err(ModelError::argument("slot", message));
            }
        }
        let d = model.config().hidden_size;
        let mut last = model.arenas().lease(active.len() * d);
        self.feed(model, &active, |slot| slot.num_cached..slot.tokens.len(), &mut last);
        let step = self.draw(model, &active, &choices, &last)?;
        for (&slot, &token) in step.slots.iter().zip(&step.tokens) {
            let slot = self.slot_mut(slot)?;
            slot.num_cached = slot.tokens.len();
            slot.tokens.push(token);
        }
        Ok(step)
    }

    /// Ends a sequence; its slot and the pages that no other sequence shares are free again.
    ///
    /// # Errors
    /// If the slot is not in use.
    pub fn remove(&mut self, slot: usize) -> Result<(), ModelError> {
        self.slot(slot)?;
        if let Some(slot) = self.slots[slot].take() {
            self.store.release(slot.pages);
        }
        Ok(())
    }

    /// Slots in use, ascending.
    pub fn active(&self) -> Vec<usize> {
        (0..self.slots.len()).filter(|&slot| self.slots[slot].is_some()).collect()
    }

    /// Tokens of a sequence so far, prompt included.
    ///
    /// # Errors
    /// If the slot is not in use.
    pub fn length(&self, slot: usize) -> Result<usize, ModelError> {
        Ok(self.slot(slot)?.tokens.len())
    }

    fn check_model(&self, model: &Model) -> Result<(), ModelError> {
        if self.model != model.id() {
            Err(ModelError::DecoderForeign)
        } else if self.version != model.version() {
            Err(ModelError::DecoderStale)
        } else {
            Ok(())
        }
    }

    fn slot(&self, slot: usize) -> Result<&Slot, ModelError> {
        self.slots.get(slot).and_then(Option::as_ref).ok_or_else(|| unknown_slot(slot))
    }

    fn slot_mut(&mut self, slot: usize) -> Result<&mut Slot, ModelError> {
        self.slots.get_mut(slot).and_then(Option::as_mut).ok_or_else(|| unknown_slot(slot))
    }

    fn free_slot(&self) -> Result<usize, ModelError> {
        self.slots.iter().position(Option::is_none).ok_or_else(|| {
            let message = format!("{} are all in use: remove a sequence first", self.slots.len());
            ModelError::argument("slots", message)
        })
    }

    fn occupy(&mut self, slot: Slot) -> Result<usize, ModelError> {
        let free = self.free_slot()?;
        self.slots[free] = Some(slot);
        Ok(free)
    }

    /// Takes the chosen positions of each slot through the blocks. `last` [slots, d] gets the residual stream of each
    /// slot's last one; it may be empty.
    fn feed(
        &mut self,
        model: &Model,
        slots: &[usize],
        positions: impl Fn(&Slot) -> Range<usize>,
        last: &mut [f32],
    ) {
        let d = model.config().hidden_size;
        let mut segments = Vec::new();
        let mut num_rows = 0;
        for (row, &index) in slots.iter().enumerate() {
            let Some(slot) = &mut self.slots[index] else { continue };
            let Range { mut start, end } = positions(slot);
            self.store.reserve(&mut slot.pages, end);
            while start < end {
                let stop = end.min(start + CHUNK_ROWS - num_rows);
                let last = (stop == end && !last.is_empty()).then_some(row);
                segments.push(Segment { slot: index, positions: start..stop, last });
                num_rows += stop - start;
                start = stop;
                if num_rows == CHUNK_ROWS {
                    self.run_blocks(model, &segments, d, last_rows(last));
                    segments.clear();
                    num_rows = 0;
                }
            }
        }
        if num_rows > 0 {
            self.run_blocks(model, &segments, d, last);
        }
    }
}
