//! The model: parameters, the passes over them, and the checks at the entrance.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ingot_kernels::{ArenaPool, Buffer, Kernels, Lease, Level, Pool};

use crate::adapter::{Adapter, AdapterOptions, AdapterWeights, Gradients, Weights};
use crate::batch::{Batch, ForwardOptions, HeadOptions, OutputGradients, Outputs, Packing};
use crate::context::Context;
use crate::head::Head;
use crate::init::initialize;
use crate::layers::{BlockActivations, BlockScratch, Compute, Dropout, Pass, RotaryTable};
use crate::parameters::{Layout, Parameter};
use crate::{Config, Family, ModelError, PositionKind};

/// How a model is made, beside its configuration.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Instruction level; the best that the machine has unless given.
    pub level: Option<Level>,
    /// Number of threads, at least 1. Results do not depend on it.
    pub threads: usize,
    /// Number of scalar heads (`score.weight`, `score.bias`); 0 for none.
    pub num_values: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            level: None,
            threads: 1,
            num_values: 0,
        }
    }
}

/// A transformer with its parameters, in one flat buffer, and their gradients, in another that is made on demand.
pub struct Model {
    config: Config,
    num_values: usize,
    layout: Layout,
    /// Shared with other models until one of them writes to it, which makes a copy first.
    parameters: Arc<Buffer>,
    gradients: Option<Buffer>,
    adapters: Vec<Adapter>,
    compute: Arc<Compute>,
    arenas: ArenaPool,
    /// Grows to the longest sequence seen.
    rotary: Mutex<Option<Arc<RotaryTable>>>,
    id: u64,
    version: u64,
}

/// Source of [`Model`] identities.
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

impl Model {
    /// A model with the first values of `seed`.
    ///
    /// # Errors
    /// If the configuration makes no network, the level is not available, or there are no threads.
    pub fn new(config: Config, seed: u64, options: Options) -> Result<Self, ModelError> {
        config.validate()?;
        let kernels = match options.level {
            None => Kernels::best(),
            Some(level) => Kernels::new(level).ok_or_else(|| ModelError::LevelUnavailable {
                level: level.name(),
                available: Level::available()
                    .iter()
                    .map(|level| level.name())
                    .collect::<Vec<_>>()
                    .join(", "),
            })?,
        };
        if options.threads == 0 {
            return Err(ModelError::argument("threads", "must be at least 1, got 0"));
        }
        let layout = Layout::new(&config, options.num_values);
        let compute = Compute {
            kernels,
            pool: Pool::new(options.threads),
        };
        let mut parameters = Buffer::zeroed(layout.len);
        initialize(&layout, &config, seed, &compute, &mut parameters);
        Ok(Self {
            config,
            num_values: options.num_values,
            layout,
            parameters: Arc::new(parameters),
            gradients: None,
            adapters: Vec::new(),
            compute: Arc::new(compute),
            arenas: ArenaPool::new(),
            rotary: Mutex::new(None),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            version: 0,
        })
    }

    /// A second model with the parameters that this one has now. Their memory is shared until one of the two is written
    /// to, which takes a copy first and leaves the other as it is. Threads and working memory are shared for good.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            config: self.config.clone(),
            num_values: self.num_values,
            layout: self.layout.clone(),
            parameters: Arc::clone(&self.parameters),
            gradients: None,
            adapters: self.adapters.iter().map(Adapter::copy).collect(),
            compute: Arc::clone(&self.compute),
            arenas: self.arenas.clone(),
            rotary: Mutex::new(None),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            version: 0,
        }
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The Hugging Face family whose names the table uses.
    pub fn family(&self) -> Family {
        Family::of(&self.config)
    }

    /// Number of scalar heads.
    pub fn num_values(&self) -> usize {
        self.num_values
    }

    /// Number of scalar heads of a pass through an adapter or none.
    pub fn num_values_of(&self, adapter: Option<usize>) -> usize {
        adapter
            .and_then(|i| self.adapters.get(i))
            .map_or(self.num_values, Adapter::num_values)
    }

    /// All tensors in the order of the flat buffers.
    pub fn table(&self) -> &[Parameter] {
        &self.layout.table
    }

    /// Number of parameters.
    pub fn num_parameters(&self) -> usize {
        self.layout.len
    }

    /// The flat buffer of parameters. It stays where it is as long as no other model shares it.
    pub fn parameters(&self) -> &[f32] {
        &self.parameters
    }

    /// The flat buffer itself: while the handle lives, the next write to the model takes a copy.
    pub fn shared_parameters(&self) -> Arc<Buffer> {
        Arc::clone(&self.parameters)
    }

    /// The flat buffer of parameters for this model alone: a copy where it was shared. No change by itself.
    pub fn own_parameters(&mut self) -> &mut [f32] {
        Arc::<Buffer>::make_mut(&mut self.parameters)
    }

    /// The flat buffer of parameters for writing: contexts and decoders made before are stale from here on.
    pub fn parameters_mut(&mut self) -> &mut [f32] {
        self.version += 1;
        self.own_parameters()
    }

    /// The flat buffer of gradients, once there is one. It never moves after that.
    pub fn gradients(&self) -> Option<&[f32]> {
        self.gradients.as_deref()
    }

    /// The flat buffer of gradients; made, with zeros, where there is none yet.
    pub fn gradients_mut(&mut self) -> &mut [f32] {
        gradients_or_zeros(&mut self.gradients, self.layout.len)
    }

    /// Adds an adapter of low rank and returns its number: `scale` B A on top of each of `modules`, which are names of
    /// weights without `.weight`. A and B are zeros; the scalar heads are copies of the model's where it has as many, else
    /// zeros.
    ///
    /// # Errors
    /// If a number is out of its range or a module is none.
    pub fn add_adapter(
        &mut self,
        options: AdapterOptions,
        modules: &[String],
    ) -> Result<usize, ModelError> {
        let adapter = Adapter::new(&self.layout, &self.parameters, options, modules)?;
        self.adapters.push(adapter);
        Ok(self.adapters.len() - 1)
    }

    /// Number of adapters; they count from 0.
    pub fn num_adapters(&self) -> usize {
        self.adapters.len()
    }

    /// All tensors of the model, or of one of its adapters, in the order of their flat buffers.
    ///
    /// # Errors
    /// If there is no such adapter.
    pub fn table_of(&self, adapter: Option<usize>) -> Result<&[Parameter], ModelError> {
        Ok(match self.check_adapter(adapter)? {
            None => &self.layout.table,
            Some(i) => &self.adapters[i].table,
        })
    }

    /// The flat buffer of an adapter's parameters for writing: contexts and decoders made before are stale from here on.
    /// It never moves.
    ///
    /// # Errors
    /// If there is no such adapter.
    pub fn adapter_parameters_mut(&mut self, adapter: usize) -> Result<&mut [f32], ModelError> {
        self.check_adapter(Some(adapter))?;
        self.version += 1;
        Ok(&mut self.adapters[adapter].parameters)
    }

    /// The flat buffer of an adapter's gradients; made, with zeros, where there is none yet. It never moves after that.
    ///
    /// # Errors
    /// If there is no such adapter.
    pub fn adapter_gradients_mut(&mut self, adapter: usize) -> Result<&mut [f32], ModelError> {
        self.check_adapter(Some(adapter))?;
        let adapter = &mut self.adapters[adapter];
        Ok(gradients_or_zeros(
            &mut adapter.gradients,
            adapter.parameters.len(),
        ))
    }

    /// All flat buffers that exist: parameters and gradients of the model and of its adapters.
    pub fn buffers(&self) -> impl Iterator<Item = &[f32]> {
        let own = [Some(&*self.parameters), self.gradients.as_ref()];
        let adapters = self.adapters.iter();
        let adapters =
            adapters.flat_map(|adapter| [Some(&adapter.parameters), adapter.gradients.as_ref()]);
        own.into_iter()
            .chain(adapters)
            .flatten()
            .map(|buffer| &**buffer)
    }

    /// The gradients of the model, or of one of its adapters, once there are some.
    pub(crate) fn gradients_of(&self, adapter: Option<usize>) -> Option<&[f32]> {
        match adapter {
            None => self.gradients.as_deref(),
            Some(i) => self.adapters.get(i)?.gradients.as_deref(),
        }
    }

    pub(crate) fn check_adapter(
        &self,
        adapter: Option<usize>,
    ) -> Result<Option<usize>, ModelError> {
        match adapter {
            Some(i) if i >= self.adapters.len() => {
                let message = format!("is {i}, but the model has {}", self.adapters.len());
                Err(ModelError::argument("adapter", message))
            }
            _ => Ok(adapter),
        }
    }

    /// What a pass through an adapter (or none) reads.
    pub(crate) fn weights(&self, adapter: Option<usize>) -> Weights<'_> {
        Weights {
            base: &self.parameters,
            adapter: adapter
                .and_then(|i| self.adapters.get(i))
                .map(|adapter| AdapterWeights {
                    places: &adapter.places,
                    parameters: &adapter.parameters,
                    dropout: None,
                }),
        }
    }

    /// Sets all gradients to 0, those of adapters too.
    pub fn zero_grad(&mut self) {
        let own = self.gradients.iter_mut();
        let adapters = self.adapters.iter_mut();
        for gradients in own.chain(adapters.filter_map(|adapter| adapter.gradients.as_mut())) {
            let pieces = gradients.chunks_mut(ZERO_PIECE).collect();
            self.compute
                .pool
                .for_each(pieces, |piece: &mut [f32]| piece.fill(0.0));
        }
    }

    /// The threads.
    pub fn pool(&self) -> &Pool {
        &self.compute.pool
    }

    /// The kernels in use.
    pub fn kernels(&self) -> &Kernels {
        &self.compute.kernels
    }

    /// Counts the changes of the parameters made through this interface.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Evaluates a batch. With `options.train` a [`Context`] comes back that a backward pass may use and dropout is on;
    /// without it nothing is kept.
    ///
    /// # Errors
    /// If the batch or the options do not fit together or to the model; the message names the entry.
    pub fn forward(
        &self,
        batch: &Batch<'_>,
        options: &ForwardOptions<'_>,
    ) -> Result<(Option<Context>, Outputs), ModelError> {
        let packing = Packing::new(batch, &self.config)?;
        let adapter = self.check_adapter(options.adapter)?;
        let num_values = self.num_values_of(adapter);
        let head_options = HeadOptions::new(options, &packing, &self.config, num_values)?;
        if options.train {
            let context = self.run_blocks(packing, head_options, adapter, Some(options.seed));
            let outputs = self.head(adapter).forward(
                &self.arenas,
                &context.packing,
                &context.head,
                &context.output,
            );
            return Ok((Some(context), outputs));
        }
        let rotary = self.rotary_table(packing.longest);
        let pass = self.pass(&packing, adapter, rotary.as_deref(), None);
        let output = self.run_blocks_in_place(&pass, &packing.tokens);
        Ok((
            None,
            self.head(adapter)
                .forward(&self.arenas, &packing, &head_options, &output),
        ))
    }

    /// Adds to the gradients those of a scalar whose gradients with respect to the outputs are given. The context is
    /// spent by it; an error in the arguments leaves it usable.
    ///
    /// # Errors
    /// If the context is spent, stale or another model's, or an array has a wrong length.
    pub fn backward(
        &mut self,
        context: &mut Context,
        gradients: &OutputGradients<'_>,
    ) -> Result<(), ModelError> {
        if context.model != self.id {
            return Err(ModelError::ContextForeign);
        }
        if context.spent {
            return Err(ModelError::ContextSpent);
        }
        if context.version != self.version {
            return Err(ModelError::ContextStale);
        }
        self.check_gradients(context, gradients)?;
        let mut d_x = self.arenas.lease(context.output.len());
        let (head, arenas, mut flat) = self.split(context.adapter);
        head.backward(
            arenas,
            &mut flat,
            &context.head,
            gradients,
            &context.output,
            &mut d_x,
        );
        self.backward_blocks(context, d_x);
        Ok(())
    }

    /// The next-token loss `sum of weights * -logprob`, evaluated and differentiated in one go: adds to the gradients and
    /// returns the sum. `weights` `[N]` count where there is a target. Dropout is on where `options.train`.
    ///
    /// # Errors
    /// If the batch or the options do not fit together or to the model; the message names the entry.
    pub fn forward_backward(
        &mut self,
        batch: &Batch<'_>,
        weights: &[f32],
        options: &ForwardOptions<'_>,
    ) -> Result<f64, ModelError> {
        let packing = Packing::new(batch, &self.config)?;
        ModelError::check_length(
            "weights",
            weights.len(),
            packing.num_rows(),
            "a batch of that many tokens",
        )?;
        let options_without_extras = ForwardOptions {
            want: crate::Want::LOGPROBS,
            value_rows: None,
            hidden_rows: None,
            candidates: None,
            ..*options
        };
        let adapter = self.check_adapter(options.adapter)?;
        let num_values = self.num_values_of(adapter);
        let head_options =
            HeadOptions::new(&options_without_extras, &packing, &self.config, num_values)?;
        let seed = options.train.then_some(options.seed);
        let mut context = self.run_blocks(packing, head_options, adapter, seed);
        let mut d_x = self.arenas.lease(context.output.len());
        let (head, arenas, mut flat) = self.split(adapter);
        let loss = head.forward_backward(
            arenas,
            &mut flat,
            &context.head,
            weights,
            &context.output,
            &mut d_x,
        );
        self.backward_blocks(&mut context, d_x);
        Ok(loss)
    }

    /// Parameters of the model or of an adapter, their gradients and what computes on them, for the optimizer: counts as a
    /// change of the parameters.
    pub(crate) fn step_parts(
        &mut self,
        adapter: Option<usize>,
    ) -> Result<(&Compute, &mut [f32], &[f32]), ModelError> {
        self.check_adapter(adapter)?;
        if let Some(i) = adapter {
            let Adapter {
                parameters,
                gradients,
                ..
            } = &mut self.adapters[i];
            let gradients = gradients.as_deref().ok_or(ModelError::NoGradients)?;
            self.version += 1;
            return Ok((&self.compute, parameters, gradients));
        }
        let gradients = self.gradients.as_deref().ok_or(ModelError::NoGradients)?;
        self.version += 1;
        Ok((
            &self.compute,
            Arc::<Buffer>::make_mut(&mut self.parameters),
            gradients,
        ))
    }

    /// Tells models apart.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn compute(&self) -> &Compute {
        &self.compute
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn arenas(&self) -> &ArenaPool {
        &self.arenas
    }

    pub(crate) fn head(&self, adapter: Option<usize>) -> Head<'_> {
        Head {
            compute: &self.compute,
            weights: self.weights(adapter),
            layout: &self.layout,
        }
    }

    /// The rotary angles of at least `num_positions` positions; nothing where positions are learned.
    pub(crate) fn rotary_table(&self, num_positions: usize) -> Option<Arc<RotaryTable>> {
        if self.config.position != PositionKind::Rotary {
            return None;
        }
        let mut table = self.rotary.lock().unwrap_or_else(PoisonError::into_inner);
        match &*table {
            Some(table) if table.num_positions() >= num_positions => Some(Arc::clone(table)),
            _ => {
                let longer = Arc::new(RotaryTable::new(
                    &self.config,
                    num_positions.next_power_of_two(),
                ));
                *table = Some(Arc::clone(&longer));
                Some(longer)
            }
        }
    }

    fn pass<'a>(
        &'a self,
        packing: &'a Packing,
        adapter: Option<usize>,
        rotary: Option<&'a RotaryTable>,
        dropout_seed: Option<u64>,
    ) -> Pass<'a> {
        make_pass(
            &self.compute,
            self.weights(adapter),
            &self.config,
            packing,
            rotary,
            dropout_seed,
        )
    }

    /// The head, the arenas and the gradients of a pass through an adapter or none.
    fn split(&mut self, adapter: Option<usize>) -> (Head<'_>, &ArenaPool, Gradients<'_>) {
        let (weights, gradients) = split_weights(
            &self.parameters,
            &mut self.gradients,
            &mut self.adapters,
            adapter,
        );
        let head = Head {
            compute: &self.compute,
            weights,
            layout: &self.layout,
        };
        (head, &self.arenas, gradients)
    }

    /// The embedding and all blocks, keeping what the backward pass needs.
    fn run_blocks(
        &self,
        packing: Packing,
        head: HeadOptions,
        adapter: Option<usize>,
        dropout_seed: Option<u64>,
    ) -> Context {
        let num_rows = packing.num_rows();
        let rotary = self.rotary_table(packing.longest);
        let mut output = self.arenas.lease(num_rows * self.config.hidden_size);
        let lease = |block| self.arenas.lease(BlockActivations::len(block, num_rows));
        let mut blocks: Vec<Lease> = self.layout.blocks.iter().map(lease).collect();
        let pass = self.pass(&packing, adapter, rotary.as_deref(), dropout_seed);
        let mut scratch = BlockScratch::forward(
            &self.arenas,
            &self.layout.blocks[0],
            num_rows,
            pass.dropout.is_some(),
        );
        let mut rest = &mut blocks[..];
        for (i, block) in self.layout.blocks.iter().enumerate() {
            let Some((arena, following)) = std::mem::take(&mut rest).split_first_mut() else {
                break;
            };
            rest = following;
            let mut kept = BlockActivations::cut(block, num_rows, arena);
            if i == 0 {
                let (tokens, dropout) = (&packing.tokens, pass.dropout.as_ref());
                let embedding = &self.layout.embedding;
                embedding.forward(
                    &self.compute,
                    &self.parameters,
                    tokens,
                    pass.positions,
                    dropout,
                    kept.x,
                );
            }
            // A block's result is what the next one keeps as its entrance.
            match (self.layout.blocks.get(i + 1), rest.first_mut()) {
                (Some(next), Some(arena)) => {
                    let next = BlockActivations::cut(next, num_rows, arena);
                    block.forward(&pass, &mut kept, next.x, &mut scratch);
                }
                _ => block.forward(&pass, &mut kept, &mut output, &mut scratch),
            }
        }
        Context {
            model: self.id,
            version: self.version,
            adapter,
            spent: false,
            packing,
            head,
            dropout_seed,
            rotary,
            blocks,
            output,
        }
    }

    /// The embedding and all blocks, keeping nothing; returns the residual stream `[N, d]`.
    fn run_blocks_in_place(&self, pass: &Pass<'_>, tokens: &[u32]) -> Lease {
        let num_rows = tokens.len();
        let attention = &self.layout.blocks[0].attention;
        let mut x = self.arenas.lease(num_rows * self.config.hidden_size);
        let mut qkv = self.arenas.lease(num_rows * attention.qkv_width());
        let mut attended = self.arenas.lease(num_rows * attention.query_width());
        let mut lse = self.arenas.lease(num_rows * attention.heads);
        let mut scratch =
            BlockScratch::forward(&self.arenas, &self.layout.blocks[0], num_rows, false);
        let embedding = &self.layout.embedding;
        embedding.forward(
            &self.compute,
            &self.parameters,
            tokens,
            pass.positions,
            None,
            &mut x,
        );
        for block in &self.layout.blocks {
            block.forward_in_place(
                pass,
                &mut x,
                &mut qkv,
                &mut attended,
                &mut lse,
                &mut scratch,
            );
        }
        x
    }

    /// The backward pass from the gradient `d_x` `[N, d]` of the residual stream to the embedding; spends the context.
    fn backward_blocks(&mut self, context: &mut Context, mut d_x: Lease) {
        context.spent = true;
        let num_rows = context.packing.num_rows();
        let compute = &self.compute;
        let (weights, mut gradients) = split_weights(
            &self.parameters,
            &mut self.gradients,
            &mut self.adapters,
            context.adapter,
        );
        let pass = make_pass(
            compute,
            weights,
            &self.config,
            &context.packing,
            context.rotary.as_deref(),
            context.dropout_seed,
        );
        let dropout = pass.dropout.as_ref();
        let mut scratch = BlockScratch::backward(
            &self.arenas,
            &self.layout.blocks[0],
            num_rows,
            dropout.is_some(),
        );
        for block in self.layout.blocks.iter().rev() {
            let Some(mut arena) = context.blocks.pop() else {
                break;
            };
            let mut kept = BlockActivations::cut(block, num_rows, &mut arena);
            block.backward(&pass, &mut gradients, &mut kept, &mut d_x, &mut scratch);
        }
        if let Some(gradients) = gradients.base() {
            self.layout.embedding.backward(
                compute,
                gradients,
                self.config.vocab_size,
                self.config.max_position_embeddings,
                &context.packing.tokens,
                &context.packing.positions,
                dropout,
                &mut d_x,
            );
        }
        context.output = self.arenas.lease(0);
    }

    fn check_gradients(
        &self,
        context: &Context,
        gradients: &OutputGradients<'_>,
    ) -> Result<(), ModelError> {
        let num_rows = context.packing.num_rows();
        let per_row = [
            ("d_logprobs", gradients.d_logprobs),
            ("d_entropy", gradients.d_entropy),
            ("d_lse", gradients.d_lse),
            ("d_zbar", gradients.d_zbar),
        ];
        for (name, array) in per_row {
            if let Some(array) = array {
                ModelError::check_length(
                    name,
                    array.len(),
                    num_rows,
                    "a context of that many tokens",
                )?;
            }
        }
        if let Some(d_values) = gradients.d_values {
            if !context.head.want.values {
                return Err(ModelError::argument(
                    "d_values",
                    "was given, but the forward pass was not asked for values",
                ));
            }
            ModelError::check_length(
                "d_values",
                d_values.len(),
                num_rows * context.head.num_values,
                "the output values",
            )?;
        }
        if let Some(d_hidden) = gradients.d_hidden {
            if !context.head.want.hidden {
                return Err(ModelError::argument(
                    "d_hidden",
                    "was given, but the forward pass was not asked for hidden",
                ));
            }
            let expected = context.head.hidden_rows.len() * self.config.hidden_size;
            ModelError::check_length("d_hidden", d_hidden.len(), expected, "the output hidden")?;
        }
        if let Some(d_candidates) = gradients.d_candidates {
            if !context.head.want.candidate_logprobs {
                return Err(ModelError::argument(
                    "d_candidates",
                    "was given, but the forward pass was not asked for candidate_logprobs",
                ));
            }
            let expected = context.head.candidates.len();
            ModelError::check_length(
                "d_candidates",
                d_candidates.len(),
                expected,
                "the output candidate_logprobs",
            )?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("config", &self.config)
            .field("num_values", &self.num_values)
            .field("level", &self.compute.kernels.level())
            .field("threads", &self.compute.pool.threads())
            .finish_non_exhaustive()
    }
}

/// Floats that one work item sets to zero.
const ZERO_PIECE: usize = 1 << 18;

fn gradients_or_zeros(gradients: &mut Option<Buffer>, len: usize) -> &mut [f32] {
    gradients.get_or_insert_with(|| Buffer::zeroed(len))
}

/// What a pass through an adapter (or none) reads, and the gradients that it adds to.
fn split_weights<'a>(
    base: &'a [f32],
    gradients: &'a mut Option<Buffer>,
    adapters: &'a mut [Adapter],
    adapter: Option<usize>,
) -> (Weights<'a>, Gradients<'a>) {
    match adapter.and_then(|i| adapters.get_mut(i)) {
        None => (
            Weights::plain(base),
            Gradients::Base(gradients_or_zeros(gradients, base.len())),
        ),
        Some(Adapter {
            places,
            parameters,
            gradients,
            ..
        }) => {
            let places = &*places;
            let flat = gradients_or_zeros(gradients, parameters.len());
            let weights = Weights {
                base,
                adapter: Some(AdapterWeights {
                    places,
                    parameters,
                    dropout: None,
                }),
            };
            (weights, Gradients::Adapter(places, flat))
        }
    }
}

fn make_pass<'a>(
    compute: &'a Compute,
    weights: Weights<'a>,
    config: &Config,
    packing: &'a Packing,
    rotary: Option<&'a RotaryTable>,
    dropout_seed: Option<u64>,
) -> Pass<'a> {
    let dropout = |probability: f32| {
        let seed = dropout_seed.filter(|_| probability > 0.0)?;
        Some(Dropout {
            probability,
            seed,
            sequence_ids: &packing.row_sequence_ids,
            positions: &packing.positions,
        })
    };
    let adapter = weights.adapter.map(|adapter| AdapterWeights {
        dropout: dropout(adapter.places.dropout),
        ..adapter
    });
    Pass {
        compute,
        weights: Weights { adapter, ..weights },
        rotary,
        offsets: &packing.offsets,
        sequence_ids: &packing.sequence_ids,
        positions: &packing.positions,
        dropout: dropout(config.dropout as f32),
    }
}
