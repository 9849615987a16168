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
use ingot_kernels::{Kernels, Mat, MatMut, PagedSequence, Pool};

use crate::batch::{HeadOptions, check_banned, check_ids};
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
    /// The adapter that all passes go through; none for the model as it is.
    pub adapter: Option<usize>,
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
    adapter: Option<usize>,
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
            let argument = if options.max_tokens == 0 {
                "max_tokens"
            } else {
                "max_sequences"
            };
            return Err(ModelError::argument(argument, "must be at least 1, got 0"));
        }
        if config.position == PositionKind::Learned
            && options.max_tokens > config.max_position_embeddings
        {
            let message = format!(
                "{} is beyond the {} positions that the model has learned",
                options.max_tokens, config.max_position_embeddings
            );
            return Err(ModelError::argument("max_tokens", message));
        }
        Ok(Self {
            model: model.id(),
            version: model.version(),
            adapter: model.check_adapter(options.adapter)?,
            max_tokens: options.max_tokens,
            seed: options.seed,
            banned_ids: check_banned(options.banned_ids, config.vocab_size)?,
            store: PageStore::new(
                model.layout().blocks[0].attention.shape(),
                config.num_hidden_layers,
            ),
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
            return Err(ModelError::argument(
                "tokens",
                "is empty: a sequence begins with at least one token",
            ));
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
            temperature: sampling.divisor(),
            banned_ids: self.banned_ids.clone(),
            ..HeadOptions::default()
        };
        let tokens = tokens.to_vec();
        let pages = PageTable::default();
        self.occupy(Slot {
            sequence_id,
            sampling,
            head,
            tokens,
            num_cached: 0,
            pages,
        })
    }

    /// Begins a second sequence that is so far the same as `slot`'s, and shares its pages.
    ///
    /// # Errors
    /// If the slot is not in use, or all slots are.
    pub fn fork(
        &mut self,
        model: &Model,
        slot: usize,
        sequence_id: i64,
    ) -> Result<usize, ModelError> {
        self.check_model(model)?;
        let unread = self.slot(slot)?.tokens.len() - 1;
        self.free_slot()?;
        // Both read the last token themselves, for its logits; what is before it is read once.
        self.feed(
            model,
            &[slot],
            |slot| slot.num_cached..unread.max(slot.num_cached),
            &mut [],
        );
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
    pub fn step(
        &mut self,
        model: &Model,
        forced: &[(usize, i32)],
    ) -> Result<DecodeStep, ModelError> {
        self.check_model(model)?;
        let active = self.active();
        let mut choices: Vec<Option<i32>> = vec![None; self.slots.len()];
        for &(slot, token) in forced {
            self.slot(slot)?;
            check_ids("forced", &[token], 0, model.config().vocab_size)?;
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
        self.feed(
            model,
            &active,
            |slot| slot.num_cached..slot.tokens.len(),
            &mut last,
        );
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
        (0..self.slots.len())
            .filter(|&slot| self.slots[slot].is_some())
            .collect()
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
        self.slots
            .get(slot)
            .and_then(Option::as_ref)
            .ok_or_else(|| unknown_slot(slot))
    }

    fn slot_mut(&mut self, slot: usize) -> Result<&mut Slot, ModelError> {
        self.slots
            .get_mut(slot)
            .and_then(Option::as_mut)
            .ok_or_else(|| unknown_slot(slot))
    }

    fn free_slot(&self) -> Result<usize, ModelError> {
        self.slots.iter().position(Option::is_none).ok_or_else(|| {
            let message = format!(
                "{} are all in use: remove a sequence first",
                self.slots.len()
            );
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
        let mut segments = Vec::new();
        let mut num_rows = 0;
        for (row, &index) in slots.iter().enumerate() {
            let Some(slot) = &mut self.slots[index] else {
                continue;
            };
            let Range { mut start, end } = positions(slot);
            self.store.reserve(&mut slot.pages, end);
            while start < end {
                let stop = end.min(start + CHUNK_ROWS - num_rows);
                let last_row = (stop == end && !last.is_empty()).then_some(row);
                segments.push(Segment {
                    slot: index,
                    positions: start..stop,
                    last: last_row,
                });
                num_rows += stop - start;
                start = stop;
                if num_rows == CHUNK_ROWS {
                    self.run_blocks(model, &segments, last);
                    segments.clear();
                    num_rows = 0;
                }
            }
        }
        if num_rows > 0 {
            self.run_blocks(model, &segments, last);
        }
    }

    /// The blocks on the rows of some segments, slots ascending: stores their keys and values, and copies the rows that
    /// are a sequence's last to `last`.
    fn run_blocks(&mut self, model: &Model, segments: &[Segment], last: &mut [f32]) {
        let (compute, weights, layout) =
            (model.compute(), model.weights(self.adapter), model.layout());
        let (kernels, pool) = (&compute.kernels, &compute.pool);
        let (d, first) = (model.config().hidden_size, &layout.blocks[0]);
        let mut tokens = Vec::new();
        let mut positions = Vec::new();
        for segment in segments {
            let Some(slot) = &self.slots[segment.slot] else {
                continue;
            };
            tokens.extend(
                slot.tokens[segment.positions.clone()]
                    .iter()
                    .map(|&token| token as u32),
            );
            positions.extend(segment.positions.clone().map(|position| position as u32));
        }
        let num_rows = tokens.len();
        let rotary = model.rotary_table(
            positions
                .iter()
                .max()
                .map_or(0, |&position| position as usize + 1),
        );
        let lease = |width: usize| model.arenas().lease(num_rows * width);
        let mut x = lease(d);
        let mut normed = lease(d);
        let mut qkv = lease(first.attention.qkv_width());
        let mut rotated = lease(first.attention.rotated_width());
        let mut attended = lease(first.attention.query_width());
        let mut pre = lease(first.mlp.up.outputs);
        let mut active = lease(first.mlp.width);
        layout
            .embedding
            .forward(compute, weights.base, &tokens, &positions, None, &mut x);
        for block in &layout.blocks {
            let rotary = rotary.as_deref();
            block.attention_input(
                compute,
                weights,
                rotary,
                &positions,
                &x,
                None,
                &mut qkv,
                &mut rotated,
                &mut normed,
            );
            let (queries, keys, values) = block.attention.split(&qkv, &rotated);
            self.store_rows(pool, block.layer, segments, keys, values);
            let pages: Vec<Vec<&[f32]>> = segments
                .iter()
                .filter_map(|segment| self.slots[segment.slot].as_ref())
                .map(|slot| self.store.layer(&slot.pages, block.layer))
                .collect();
            let sequences: Vec<PagedSequence<'_>> = segments
                .iter()
                .zip(&pages)
                .map(|(segment, pages)| PagedSequence {
                    rows: segment.positions.len(),
                    length: segment.positions.end,
                    pages,
                })
                .collect();
            let out = MatMut::new(&mut attended, num_rows, block.attention.query_width());
            kernels.attention_decode(pool, &block.attention.shape(), &sequences, queries, out);
            block.attention_output(compute, weights, &attended, &mut x);
            block
                .mlp_norm
                .forward(compute, weights.base, &x, &mut normed, None);
            block.mlp_output(compute, weights, &normed, &mut pre, &mut active, &mut x);
        }
        let mut end = 0;
        for segment in segments {
            end += segment.positions.len();
            if let Some(row) = segment.last {
                last[row * d..(row + 1) * d].copy_from_slice(&x[(end - 1) * d..end * d]);
            }
        }
    }

    /// Stores one layer's keys and values of the rows of some segments, slots ascending.
    fn store_rows(
        &mut self,
        pool: &Pool,
        layer: usize,
        segments: &[Segment],
        keys: Mat<'_>,
        values: Mat<'_>,
    ) {
        let mut rest = segments.iter();
        let mut next = rest.next();
        let mut first_row = 0;
        let mut rows = Vec::with_capacity(segments.len());
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let (Some(slot), Some(segment)) = (slot, next) else {
                continue;
            };
            if segment.slot == index {
                rows.push(NewRows {
                    table: &mut slot.pages,
                    positions: segment.positions.clone(),
                    first_row,
                });
                first_row += segment.positions.len();
                next = rest.next();
            }
        }
        self.store.write(pool, layer, rows, keys, values);
    }

    /// Draws a token for each of the slots from the residual stream `x` [slots, d] of their last rows.
    fn draw(
        &self,
        model: &Model,
        slots: &[usize],
        choices: &[Option<i32>],
        x: &[f32],
    ) -> Result<DecodeStep, ModelError> {
        let (compute, weights, layout) =
            (model.compute(), model.weights(self.adapter), model.layout());
        let (d, vocab_size) = (model.config().hidden_size, model.config().vocab_size);
        let rows_at_once = slots.len().min(rows_per_chunk(vocab_size, d));
        let mut normed = model.arenas().lease(rows_at_once * d);
        let mut logits = model.arenas().lease(rows_at_once * vocab_size);
        let mut step = DecodeStep::default();
        for (slots, x) in slots
            .chunks(rows_at_once.max(1))
            .zip(x.chunks(rows_at_once.max(1) * d))
        {
            let num_rows = slots.len();
            layout
                .final_norm
                .forward(compute, weights.base, x, &mut normed[..num_rows * d], None);
            let normed = Mat::new(&normed[..num_rows * d], num_rows, d);
            let out = MatMut::new(&mut logits[..num_rows * vocab_size], num_rows, vocab_size);
            layout.head.forward(compute, weights, normed, out, false);
            let mut draws: Vec<Draw<'_>> = slots
                .iter()
                .filter_map(|&index| self.slots[index].as_ref().map(|slot| (index, slot)))
                .map(|(index, slot)| Draw {
                    slot,
                    forced: choices[index],
                    result: None,
                })
                .collect();
            let items = draws
                .iter_mut()
                .zip(logits.chunks_exact_mut(vocab_size))
                .collect();
            compute.pool.for_each_with_scratch(
                items,
                2 * vocab_size,
                |(draw, row): (&mut Draw<'_>, _), scratch| {
                    draw.result = self.draw_row(compute.kernels, draw, row, scratch);
                },
            );
            for (draw, &index) in draws.iter().zip(slots) {
                let Some((token, logprob, entropy)) = draw.result else {
                    return Err(ModelError::NotFinite {
                        sequence_id: draw.slot.sequence_id,
                    });
                };
                step.slots.push(index);
                step.tokens.push(token);
                step.logprobs.push(logprob);
                step.entropy.push(entropy);
            }
        }
        Ok(step)
    }

    /// Token, log-probability and entropy from one row of raw logits; nothing where they are not finite.
    fn draw_row(
        &self,
        kernels: Kernels,
        draw: &Draw<'_>,
        logits: &mut [f32],
        scratch: &mut [f32],
    ) -> Option<(i32, f32, f32)> {
        let slot = draw.slot;
        // Scales and masks the row; the target does not matter yet.
        let statistics = row_statistics(
            kernels,
            &slot.head,
            logits,
            draw.forced.unwrap_or_default() as usize,
        );
        if !(statistics.lse.is_finite() && statistics.entropy.is_finite()) {
            return None;
        }
        let token = draw.forced.unwrap_or_else(|| {
            let key = RandomKey {
                seed: self.seed,
                layer: 0,
                site: site::SAMPLING,
                sequence_id: slot.sequence_id,
                position: slot.tokens.len() as u64,
            };
            slot.sampling
                .draw(kernels, logits, &slot.tokens, key.uniform(), scratch)
        });
        // The row is scaled already, and a factor of 1 changes no bit: the same statistics, for the token this time.
        let statistics = kernels.head_row_statistics(logits, 1.0, token as usize);
        Some((token, statistics.logprob, statistics.entropy))
    }
}

fn unknown_slot(slot: usize) -> ModelError {
    ModelError::argument("slot", format!("{slot} is not in use"))
}

#[cfg(test)]
mod tests {
    use super::{Decoder, DecoderOptions};
    use crate::testing::{gpt2, llama};
    use crate::{Batch, Config, ForwardOptions, Model, ModelError, Options, Sampling};

    const MAX_TOKENS: usize = 200;

    fn model(config: &Config) -> Model {
        Model::new(
            Config {
                max_position_embeddings: MAX_TOKENS,
                ..config.clone()
            },
            1,
            Options::default(),
        )
        .unwrap()
    }

    fn decoder(model: &Model) -> Decoder {
        let options = DecoderOptions {
            max_tokens: MAX_TOKENS,
            max_sequences: 4,
            seed: 5,
            banned_ids: &[3],
            adapter: None,
        };
        Decoder::new(model, &options).unwrap()
    }

    fn tokens(seed: i32, length: usize) -> Vec<i32> {
        (0..length as i32)
            .map(|i| [0, 1, 2, 4, 5, 7][((i * i + seed * i + seed) % 6) as usize])
            .collect()
    }

    /// ln p of each token after the first, by the training pass.
    fn training_logprobs(model: &Model, tokens: &[i32]) -> Vec<f32> {
        let (inputs, targets) = (&tokens[..tokens.len() - 1], &tokens[1..]);
        let offsets = [0, inputs.len() as i64];
        let batch = Batch {
            tokens: inputs,
            offsets: &offsets,
            targets,
            sequence_ids: None,
        };
        let options = ForwardOptions {
            temperature: 0.7,
            banned_ids: &[3],
            train: false,
            ..ForwardOptions::default()
        };
        model.forward(&batch, &options).unwrap().1.logprobs.unwrap()
    }

    #[test]
    fn forced_tokens_have_the_bits_of_training_across_pages_and_forks() {
        for config in [gpt2(), llama()] {
            let model = model(&config);
            let mut decoder = decoder(&model);
            let sampling = Sampling {
                temperature: 0.7,
                ..Sampling::default()
            };
            // One starts alone, one with a prompt longer than a page, and one leaves the second at position 80.
            let (first, second) = (tokens(1, 150), tokens(2, 150));
            let mut third = second[..80].to_vec();
            third.extend(tokens(3, 70));
            let a = decoder.add(&model, &first[..1], 0, sampling).unwrap();
            let b = decoder.add(&model, &second[..79], 1, sampling).unwrap();
            let mut logprobs = [const { Vec::new() }; 3];
            let mut c = None;
            for i in 0..149 {
                if i == 1 {
                    c = Some(decoder.fork(&model, b, 2).unwrap());
                }
                let mut forced = vec![(a, first[1 + i])];
                forced.extend((i < 71).then(|| (b, second[79 + i])));
                forced.extend(c.filter(|_| i < 71).map(|c| (c, third[79 + i])));
                if i == 71 {
                    decoder.remove(b).unwrap();
                    decoder.remove(c.unwrap()).unwrap();
                }
                let step = decoder.step(&model, &forced).unwrap();
                for (slot, logprob) in step.slots.iter().zip(&step.logprobs) {
                    logprobs[*slot].push(logprob.to_bits());
                }
            }
            let bits = |tokens: &[i32], from: usize| -> Vec<u32> {
                training_logprobs(&model, tokens)[from..]
                    .iter()
                    .map(|x| x.to_bits())
                    .collect()
            };
            assert_eq!(logprobs[0], bits(&first, 0));
            assert_eq!(logprobs[1], bits(&second, 78));
            assert_eq!(logprobs[2], bits(&third, 79));
        }
    }

    #[test]
    fn a_prompt_longer_than_a_chunk_is_read_in_parts() {
        let config = Config {
            max_position_embeddings: 3000,
            ..llama()
        };
        let model = Model::new(config, 1, Options::default()).unwrap();
        let options = DecoderOptions {
            max_tokens: 3000,
            max_sequences: 3,
            seed: 0,
            banned_ids: &[3],
            adapter: None,
        };
        let mut decoder = Decoder::new(&model, &options).unwrap();
        let sampling = Sampling {
            temperature: 0.7,
            ..Sampling::default()
        };
        let long = tokens(4, 2500);
        for length in [700, 2499, 1] {
            decoder.add(&model, &long[..length], 0, sampling).unwrap();
        }
        let forced = [(0, long[700]), (1, long[2499]), (2, long[1])];
        let step = decoder.step(&model, &forced).unwrap();
        let expected = training_logprobs(&model, &long);
        let bits = |logprobs: &[f32]| logprobs.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(
            bits(&step.logprobs),
            bits(&[expected[699], expected[2498], expected[0]])
        );
    }

    #[test]
    fn slots_are_used_again_and_errors_name_them() {
        let model = model(&llama());
        let mut decoder = decoder(&model);
        let sampling = Sampling::default();
        for expected in 0..4 {
            assert_eq!(decoder.add(&model, &[1], 7, sampling), Ok(expected));
        }
        assert!(
            decoder
                .add(&model, &[1], 7, sampling)
                .unwrap_err()
                .to_string()
                .contains("all in use")
        );
        assert!(
            decoder
                .fork(&model, 1, 7)
                .unwrap_err()
                .to_string()
                .contains("all in use")
        );
        decoder.remove(2).unwrap();
        assert_eq!(decoder.active(), [0, 1, 3]);
        assert_eq!(
            decoder.length(2).unwrap_err().to_string(),
            "slot: 2 is not in use"
        );
        assert_eq!(
            decoder.step(&model, &[(2, 1)]).unwrap_err().to_string(),
            "slot: 2 is not in use"
        );
        assert!(
            decoder
                .step(&model, &[(1, 3)])
                .unwrap_err()
                .to_string()
                .contains("banned")
        );
        assert!(matches!(
            decoder.step(&model, &[(1, 99)]),
            Err(ModelError::OutOfRange { value: 99, .. })
        ));
        assert_eq!(decoder.length(1), Ok(1), "a refused step changes nothing");
        assert_eq!(decoder.add(&model, &[1, 2], 7, sampling), Ok(2));
        assert_eq!(decoder.step(&model, &[]).unwrap().slots, [0, 1, 2, 3]);
        assert_eq!((decoder.length(1), decoder.length(2)), (Ok(2), Ok(3)));
    }

    #[test]
    fn changed_parameters_are_noticed() {
        let mut model = model(&llama());
        let mut decoder = decoder(&model);
        decoder.add(&model, &[1], 0, Sampling::default()).unwrap();
        model.parameters_mut()[0] = 1.0;
        assert_eq!(decoder.step(&model, &[]), Err(ModelError::DecoderStale));
    }

    #[test]
    fn weights_that_are_no_numbers_are_an_error_and_change_nothing() {
        let mut model = model(&llama());
        model.parameters_mut().fill(f32::NAN);
        let mut decoder = decoder(&model);
        decoder.add(&model, &[1], 9, Sampling::default()).unwrap();
        assert_eq!(
            decoder.step(&model, &[]),
            Err(ModelError::NotFinite { sequence_id: 9 })
        );
        assert_eq!(decoder.length(0), Ok(1));
    }
}
