//! The driver for products that are large in both directions.
#![allow(unsafe_code)]

use super::isa::{Isa, Operand, Output, Segment};
use super::pack::{PackJob, Part, Role, panel_floats};
use super::plan::Plan;
use super::{ALONE_BELOW, Size};
use crate::Pool;
use crate::arena::LINE;

/// A pointer into memory that several threads write at disjoint places.
#[derive(Clone, Copy)]
struct Area(*mut f32);

// SAFETY: the driver gives each place to one thread at a time.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// Where interrupted chains wait.
#[derive(Clone, Copy)]
enum Partials {
    /// In C itself, which has no other content yet.
    Output,
    /// In a matrix of C's size: C holds what will be added to, and chains outlive the tile.
    Matrix(Area),
    /// In the thread's scratch: C holds what will be added to, and chains end with the tile.
    Scratch,
}

/// Everything the threads share during a call.
struct Work<'a> {
    size: Size,
    plan: Plan,
    c: Output<'a>,
    partials: Partials,
    /// Packed resident operand of even and odd depth blocks.
    resident: [Area; 2],
    /// Packed bands of even and odd steps.
    bands: [Area; 2],
}

/// C = A B with operands and C of the sizes in `size`.
pub(super) fn multiply<I: Isa>(pool: &Pool, size: Size, a: Operand, b: Operand, c: Output) {
    let plan = Plan::new::<I>(size, a, b);
    let (resident, band) = plan.packed_floats();
    let (resident, band) = (resident.next_multiple_of(LINE), band.next_multiple_of(LINE));
    let residents = plan.depths.min(2);
    let waiting = c.accumulate && plan.has_partials();
    let matrix = if waiting && plan.depths > 1 {
        size.m * size.n
    } else {
        0
    };
    let mut memory = pool
        .arenas()
        .lease(resident * residents + band * plan.steps().min(2) + matrix);
    let start = Area(memory.as_mut_ptr());
    let bands = resident * residents;
    let work = Work {
        size,
        plan,
        c,
        partials: match (waiting, matrix) {
            (false, _) => Partials::Output,
            (true, 0) => Partials::Scratch,
            (true, _) => Partials::Matrix(Area(start.at(bands + band * plan.steps().min(2)))),
        },
        resident: [start, Area(start.at(resident * (residents - 1)))],
        bands: [
            Area(start.at(bands)),
            Area(start.at(bands + band * (plan.steps().min(2) - 1))),
        ],
    };
    let scratch = if matches!(work.partials, Partials::Scratch) {
        plan.tile.0 * plan.tile.1
    } else {
        0
    };
    let alone = size.m * size.n * size.k.max(1) < ALONE_BELOW;

    // Stage s packs for step s and multiplies step s - 1. Multiplications come first: packing fills the gaps at the end.
    for stage in 0..=plan.steps() {
        let tiles = if stage > 0 {
            work.num_tiles(stage - 1)
        } else {
            0
        };
        let jobs = if stage < plan.steps() {
            work.pack_jobs::<I>(a, b, stage)
        } else {
            [None, None]
        };
        let counts = jobs
            .each_ref()
            .map(|job| job.as_ref().map_or(0, |(job, _)| job.count()));
        pool.for_index(
            alone,
            tiles + counts[0] + counts[1],
            scratch,
            |index, scratch| {
                if index < tiles {
                    // SAFETY: the packed operands of the step were written in the stage before, which has ended; tiles are
                    // disjoint; the CPU has the instructions, as the caller holds kernels of this level.
                    unsafe { work.tile::<I>(stage - 1, index, scratch) };
                    return;
                }
                let index = index - tiles;
                let (job, index) = if index < counts[0] {
                    (&jobs[0], index)
                } else {
                    (&jobs[1], index - counts[0])
                };
                if let Some((job, dst)) = job {
                    // SAFETY: the part lies within the operand; the area has room for it, and no tile of this stage reads
                    // it: it is of the other parity than the areas of the step that is multiplied.
                    unsafe { job.run::<I>(index, dst.0) };
                }
            },
        );
    }
}

impl Work<'_> {
    /// The packing that a step needs: its band, and before the first band of a depth block the resident operand.
    fn pack_jobs<'a, I: Isa>(
        &self,
        a: Operand<'a>,
        b: Operand<'a>,
        step: usize,
    ) -> [Option<(PackJob<'a>, Area)>; 2] {
        let (part_a, part_b) = self.plan.parts(step);
        let (resident, band) = match self.plan.resident {
            Role::A => (
                PackJob::new::<I>(a, Role::A, part_a),
                PackJob::new::<I>(b, Role::B, part_b),
            ),
            Role::B => (
                PackJob::new::<I>(b, Role::B, part_b),
                PackJob::new::<I>(a, Role::A, part_a),
            ),
        };
        let is_first = step.is_multiple_of(self.plan.bands);
        [
            is_first.then_some((resident, self.resident_area(step))),
            Some((band, self.bands[step % 2])),
        ]
    }

    fn resident_area(&self, step: usize) -> Area {
        self.resident[step / self.plan.bands % 2]
    }

    fn num_tiles(&self, step: usize) -> usize {
        let (a, b) = self.plan.parts(step);
        a.width.div_ceil(self.plan.tile.0) * b.width.div_ceil(self.plan.tile.1)
    }

    /// Multiplies one tile of a step over the depth block.
    ///
    /// # Safety
    /// The CPU has the instructions of `I`; the step's operands are packed; no other thread has this tile.
    unsafe fn tile<I: Isa>(&self, step: usize, index: usize, scratch: &mut [f32]) {
        let (part_a, part_b) = self.plan.parts(step);
        let (packed_a, packed_b) = match self.plan.resident {
            Role::A => (self.resident_area(step), self.bands[step % 2]),
            Role::B => (self.bands[step % 2], self.resident_area(step)),
        };
        let (tile_rows, tile_cols) = self.plan.tile;
        // Neighbouring items share the panels of the streamed operand, which are the ones not in L2 yet.
        let (tile_row, tile_col) = match self.plan.resident {
            Role::A => {
                let down = part_a.width.div_ceil(tile_rows);
                (index % down, index / down)
            }
            Role::B => {
                let across = part_b.width.div_ceil(tile_cols);
                (index / across, index % across)
            }
        };
        let rows = Range::new(tile_row * tile_rows, tile_rows, part_a);
        let cols = Range::new(tile_col * tile_cols, tile_cols, part_b);
        let depth = part_a.depth;
        let mut from = 0;
        loop {
            let to = (from + self.plan.chunk).min(depth);
            let segment = Segment {
                depth: to - from,
                starts: part_a.k + from == 0,
                ends: part_a.k + to == self.size.k,
            };
            for col in (cols.start..cols.end).step_by(I::NR) {
                for row in (rows.start..rows.end).step_by(I::MR) {
                    let (c_row, c_col) = (part_a.start + row, part_b.start + col);
                    let waiting = match self.partials {
                        Partials::Output => (self.c.at(c_row, c_col), self.c.stride),
                        Partials::Matrix(area) => {
                            (area.at(c_row * self.size.n + c_col), self.size.n)
                        }
                        Partials::Scratch => {
                            let at = (row - rows.start) * tile_cols + (col - cols.start);
                            (scratch.as_mut_ptr().wrapping_add(at), tile_cols)
                        }
                    };
                    let panel_a = row / I::A_WIDTH * panel_floats(I::A_WIDTH, depth);
                    let panel_b = col / I::NR * panel_floats(I::NR, depth);
                    let panels = (
                        packed_a
                            .at(panel_a + from * I::A_WIDTH + row % I::A_WIDTH)
                            .cast_const(),
                        packed_b.at(panel_b + from * I::NR).cast_const(),
                    );
                    let width = I::NR.min(cols.end - col);
                    let tile = self.c.tile((c_row, c_col), width, segment, panels, waiting);
                    // SAFETY: panels were packed for `depth` steps; the tile lies within C and, where chains wait
                    // elsewhere, within that area.
                    unsafe { I::tile(I::MR.min(rows.end - row), &tile) };
                }
            }
            from = to;
            if from >= depth {
                break;
            }
        }
    }
}

/// Outer indices of a tile, relative to its part.
struct Range {
    start: usize,
    end: usize,
}

impl Range {
    fn new(start: usize, len: usize, part: Part) -> Self {
        Self {
            start,
            end: part.width.min(start + len),
        }
    }
}
