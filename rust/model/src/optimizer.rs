//! `AdamW` (Loshchilov and Hutter 2019, algorithm 2) over the flat buffers, in groups, with clipping by the global norm
//! (Pascanu et al. 2013, algorithm 1); [`muon`] in its place on the matrices of the blocks where that is chosen.

use std::ops::Range;

use ingot_kernels::adamw::{AdamGroup, AdamSettings, EpsMode};
use ingot_kernels::{ArenaPool, Buffer};

use crate::parameters::Matrix;
use crate::{Model, ModelError, Parameter, muon};

/// Parameters that share a learning-rate factor and a weight decay.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterGroup {
    /// Names as in [`Model::table`].
    pub names: Vec<String>,
    /// The step's learning rate is multiplied by this.
    pub learning_rate_scale: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Settings that all groups share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerOptions {
    /// Decay rates of the first and second moment, each in [0, 1).
    pub betas: (f64, f64),
    /// Added to the denominator; not negative.
    pub eps: f64,
    /// Where it is added.
    pub eps_mode: EpsMode,
    /// Muon with this momentum, in [0, 1), on the matrices of the blocks (the projections of attention and MLP); `AdamW`
    /// on everything else, and everywhere without it.
    pub muon_momentum: Option<f64>,
}

impl Default for OptimizerOptions {
    fn default() -> Self {
        Self {
            betas: (0.9, 0.95),
            eps: 1e-8,
            eps_mode: EpsMode::Torch,
            muon_momentum: None,
        }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepInfo {
    /// Norm of the gradients of all groups before clipping.
    pub grad_norm: f64,
    /// Whether nothing was changed because the norm is not finite.
    pub skipped: bool,
}

/// A group with its names turned into places of the flat buffers.
#[derive(Clone, Debug)]
struct Group {
    /// What `AdamW` updates: ascending, neighbours joined.
    ranges: Vec<Range<usize>>,
    /// What Muon updates.
    matrices: Vec<Matrix>,
    learning_rate_scale: f64,
    weight_decay: f64,
}

/// `AdamW`, or Muon and `AdamW`, with the state. Parameters in no group are left alone and do not count in the norm. Muon's
/// momentum is in the first moments; its second ones stay 0.
#[derive(Debug)]
pub struct Optimizer {
    groups: Vec<Group>,
    /// All groups' places, ascending, neighbours joined.
    covered: Vec<Range<usize>>,
    /// The adapter whose parameters they are; none for the model's.
    adapter: Option<usize>,
    options: OptimizerOptions,
    m: Buffer,
    v: Buffer,
    step: u64,
    /// Working memory of Muon, kept between steps.
    arenas: ArenaPool,
}

impl Optimizer {
    /// An optimizer for chosen groups of the model's parameters.
    ///
    /// # Errors
    /// If a name is unknown or in two groups, or a setting is out of its range.
    pub fn new(
        model: &Model,
        groups: &[ParameterGroup],
        options: OptimizerOptions,
    ) -> Result<Self, ModelError> {
        Self::of(model, None, groups, options)
    }

    /// An optimizer for chosen groups of an adapter's parameters, or of the model's where there is none.
    ///
    /// # Errors
    /// As [`Optimizer::new`]; also if there is no such adapter.
    pub fn of(
        model: &Model,
        adapter: Option<usize>,
        groups: &[ParameterGroup],
        options: OptimizerOptions,
    ) -> Result<Self, ModelError> {
        check_options(&options)?;
        if options.muon_momentum.is_some() && adapter.is_some() {
            return Err(ModelError::argument(
                "muon_momentum",
                "Muon is for whole matrices, not for adapters, whose products begin at zero: use AdamW",
            ));
        }
        let table = model.table_of(adapter)?;
        let matrices = match options.muon_momentum {
            Some(_) => model.layout().matrices(),
            None => Vec::new(),
        };
        let mut owner: Vec<Option<usize>> = vec![None; table.len()];
        let mut resolved = Vec::with_capacity(groups.len());
        let mut all = Vec::new();
        for (i, group) in groups.iter().enumerate() {
            check_group(group)?;
            let mut ranges = Vec::with_capacity(group.names.len());
            let mut own_matrices = Vec::new();
            for name in &group.names {
                let place = table
                    .iter()
                    .position(|parameter| parameter.name == *name)
                    .ok_or_else(|| ModelError::UnknownParameter {
                        name: name.clone(),
                        nearest: nearest_name(table, name),
                    })?;
                if let Some(first) = owner[place].replace(i) {
                    return Err(ModelError::DuplicateParameter {
                        name: name.clone(),
                        first,
                        second: i,
                    });
                }
                let range = table[place].range();
                let before = own_matrices.len();
                own_matrices.extend(matrices.iter().filter(|m| range.contains(&m.offset)));
                all.push(range.clone());
                if own_matrices.len() == before {
                    ranges.push(range);
                }
            }
            resolved.push(Group {
                ranges: join(ranges),
                matrices: own_matrices,
                learning_rate_scale: group.learning_rate_scale,
                weight_decay: group.weight_decay,
            });
        }
        let len = table.iter().map(Parameter::len).sum();
        Ok(Self {
            groups: resolved,
            covered: join(all),
            adapter,
            options,
            m: Buffer::zeroed(len),
            v: Buffer::zeroed(len),
            step: 0,
            arenas: ArenaPool::new(),
        })
    }

    /// The usual two groups: weight decay on matrices, none on vectors.
    pub fn default_groups(model: &Model, weight_decay: f64) -> Vec<ParameterGroup> {
        let (matrices, vectors): (Vec<_>, Vec<_>) =
            model.table().iter().partition(|parameter| parameter.decay);
        let names =
            |parameters: Vec<&Parameter>| parameters.iter().map(|p| p.name.clone()).collect();
        vec![
            ParameterGroup {
                names: names(matrices),
                learning_rate_scale: 1.0,
                weight_decay,
            },
            ParameterGroup {
                names: names(vectors),
                learning_rate_scale: 1.0,
                weight_decay: 0.0,
            },
        ]
    }

    /// One step with learning rate `learning_rate`, after scaling the gradients so that their norm is at most `clip_norm`
    /// (not at all without it). Where the norm is not finite nothing changes and the step does not count.
    ///
    /// # Errors
    /// If the model has no gradients, is another one than the optimizer's, or an argument is out of its range.
    pub fn step(
        &mut self,
        model: &mut Model,
        learning_rate: f64,
        clip_norm: Option<f64>,
    ) -> Result<StepInfo, ModelError> {
        if !(learning_rate >= 0.0 && learning_rate.is_finite()) {
            let message = format!("must be a finite number of at least 0, got {learning_rate}");
            return Err(ModelError::argument("learning_rate", message));
        }
        if let Some(limit) = clip_norm
            && (limit.is_nan() || limit <= 0.0)
        {
            return Err(ModelError::argument(
                "clip_norm",
                format!("must be positive, got {limit}"),
            ));
        }
        let got = model
            .table_of(self.adapter)?
            .iter()
            .map(Parameter::len)
            .sum();
        if got != self.m.len() {
            let expected = self.m.len();
            return Err(ModelError::OptimizerMismatch { expected, got });
        }
        let gradients = model
            .gradients_of(self.adapter)
            .ok_or(ModelError::NoGradients)?;
        let (kernels, pool) = (*model.kernels(), model.pool());
        let square_of =
            |range: &Range<usize>| kernels.norm_squared_f64(pool, &gradients[range.clone()]);
        let grad_norm = self.covered.iter().map(square_of).sum::<f64>().sqrt();
        if !grad_norm.is_finite() {
            return Ok(StepInfo {
                grad_norm,
                skipped: true,
            });
        }
        self.step += 1;
        let gradient_scale = match clip_norm {
            // torch's form: the small number keeps the norm a little below the limit.
            Some(limit) if grad_norm > limit => (limit / (grad_norm + 1e-6)) as f32,
            _ => 1.0,
        };
        let settings = AdamSettings {
            step: self.step,
            betas: self.options.betas,
            eps: self.options.eps,
            eps_mode: self.options.eps_mode,
            gradient_scale,
        };
        let mut groups: Vec<AdamGroup> = Vec::new();
        for group in &self.groups {
            groups.extend(group.ranges.iter().map(|range| AdamGroup {
                range: range.clone(),
                learning_rate: learning_rate * group.learning_rate_scale,
                weight_decay: group.weight_decay,
            }));
        }
        groups.sort_by_key(|group| group.range.start);
        let (compute, parameters, gradients) = model.step_parts(self.adapter)?;
        if let Some(momentum) = self.options.muon_momentum {
            let mut targets: Vec<muon::Target> = Vec::new();
            for group in &self.groups {
                targets.extend(group.matrices.iter().map(|&matrix| muon::Target {
                    matrix,
                    learning_rate: learning_rate * group.learning_rate_scale,
                    weight_decay: group.weight_decay,
                }));
            }
            targets.sort_by_key(|target| target.matrix.offset);
            let (m, arenas) = (&mut self.m, &self.arenas);
            muon::step(
                compute,
                arenas,
                parameters,
                gradients,
                m,
                &targets,
                momentum,
                gradient_scale,
            );
        }
        kernels.adamw(
            &compute.pool,
            parameters,
            gradients,
            &mut self.m,
            &mut self.v,
            &groups,
            &settings,
        );
        Ok(StepInfo {
            grad_norm,
            skipped: false,
        })
    }

    /// First moments, flat like the parameters.
    pub fn first_moments(&self) -> &[f32] {
        &self.m
    }

    /// Second moments, flat like the parameters.
    pub fn second_moments(&self) -> &[f32] {
        &self.v
    }

    /// Both moments for writing, when a saved state is loaded.
    pub fn moments_mut(&mut self) -> (&mut [f32], &mut [f32]) {
        (&mut self.m, &mut self.v)
    }

    /// Number of steps taken (skipped ones do not count).
    pub fn steps_taken(&self) -> u64 {
        self.step
    }

    /// Sets the number of steps taken, when a saved state is loaded.
    pub fn set_steps_taken(&mut self, step: u64) {
        self.step = step;
    }

    /// The shared settings.
    pub fn options(&self) -> &OptimizerOptions {
        &self.options
    }
}

fn check_options(options: &OptimizerOptions) -> Result<(), ModelError> {
    for (argument, beta) in [("betas[0]", options.betas.0), ("betas[1]", options.betas.1)] {
        if !(0.0..1.0).contains(&beta) {
            return Err(ModelError::argument(
                argument,
                format!("must be in [0, 1), got {beta}"),
            ));
        }
    }
    if let Some(momentum) = options.muon_momentum
        && !(0.0..1.0).contains(&momentum)
    {
        return Err(ModelError::argument(
            "muon_momentum",
            format!("must be in [0, 1), got {momentum}"),
        ));
    }
    if !(options.eps >= 0.0 && options.eps.is_finite()) {
        return Err(ModelError::argument(
            "eps",
            format!("must be a finite number of at least 0, got {}", options.eps),
        ));
    }
    Ok(())
}

fn check_group(group: &ParameterGroup) -> Result<(), ModelError> {
    let settings = [
        ("learning_rate_scale", group.learning_rate_scale),
        ("weight_decay", group.weight_decay),
    ];
    for (argument, value) in settings {
        if !(value >= 0.0 && value.is_finite()) {
            let message = format!("must be a finite number of at least 0, got {value}");
            return Err(ModelError::argument(argument, message));
        }
    }
    Ok(())
}

/// Sorts ranges and joins neighbours.
fn join(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

/// The table's name that is most like `name`: the fewest edits.
fn nearest_name(table: &[Parameter], name: &str) -> String {
    table
        .iter()
        .map(|parameter| parameter.name.as_str())
        .min_by_key(|candidate| edit_distance(candidate, name))
        .unwrap_or_default()
        .to_owned()
}

/// Levenshtein's distance in bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut previous: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = previous[0];
        previous[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let substitution = diagonal + usize::from(x != y);
            diagonal = previous[j + 1];
            previous[j + 1] = substitution.min(diagonal + 1).min(previous[j] + 1);
        }
    }
    previous[b.len()]
}
