//! How a large product is cut into steps and tiles. Depends on the shape alone.
//!
//! K is cut into depth blocks. In each, the narrower operand (the resident one) is packed whole and the other one is
//! streamed: cut into bands that are packed one ahead of the multiplication, so that one parallel stage multiplies band
//! s and packs band s + 1. Within a band the product is cut into tiles, the items of work.

use super::Size;
use super::isa::{Along, Isa, Operand};
use super::pack::{Part, Role, panel_floats};

/// Floats of a packed resident operand: a share of a large L3 cache, and a bound on memory.
const RESIDENT_FLOATS: usize = 4 << 20;
/// Floats of a packed depth block of both operands where both are cut along depth.
const BLOCK_FLOATS: usize = 1 << 20;
/// Floats of one packed band of the streamed operand (there are two).
const BAND_FLOATS: usize = 2 << 20;
/// Least and largest depth block. A short block reloads partial chains often; a long one makes bands narrow.
const DEPTH: (usize, usize) = (512, 8192);
/// Largest tile of work: its panels over one `CHUNK` of depth fit in an L2 cache of 1 MiB.
const TILE: (usize, usize) = (96, 192);
/// Depth that a tile works through before it goes on to the next, so that its panels stay in L2.
const CHUNK: usize = 768;
/// Tiles of a band below which smaller ones are taken, to share the work out evenly.
const TILES: usize = 48;

/// The largest length not above `limit` (at least 1) that cuts `len` into equal blocks, rounded up to `multiple`.
fn even(len: usize, limit: usize, multiple: usize) -> usize {
    let blocks = len.div_ceil(limit.max(1)).max(1);
    len.div_ceil(blocks)
        .next_multiple_of(multiple)
        .max(multiple)
}

/// The cuts of one product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    size: Size,
    /// The role of the operand that is packed whole.
    pub resident: Role,
    /// Depth block.
    depth: usize,
    pub depths: usize,
    /// Width of a band.
    band: usize,
    pub bands: usize,
    /// Depth of one chunk within a depth block.
    pub chunk: usize,
    /// Rows and columns of a tile.
    pub tile: (usize, usize),
    /// Widths of the panels of A and B.
    panels: (usize, usize),
}

impl Plan {
    pub fn new<I: Isa>(size: Size, a: Operand, b: Operand) -> Self {
        let Size { m, n, k } = size;
        let (resident, narrow, wide) = if m < n {
            (Role::A, m, n)
        } else {
            (Role::B, n, m)
        };
        // Operands along width are read row by row: better whole rows of a short depth block than strips of a long one.
        let limit = if a.along == Along::Width && b.along == Along::Width {
            BLOCK_FLOATS / (m + n)
        } else {
            RESIDENT_FLOATS / narrow
        };
        let depth = even(k, limit.clamp(DEPTH.0, DEPTH.1), 1);
        let (mut rows, mut cols) = (
            TILE.0.next_multiple_of(I::MR),
            TILE.1.next_multiple_of(I::NR),
        );
        let bound = if resident == Role::A { cols } else { rows };
        let band = even(wide, (BAND_FLOATS / depth).max(bound), bound);
        let (band_m, band_n) = if resident == Role::A {
            (m, band.min(n))
        } else {
            (band.min(m), n)
        };
        let halve = |len: usize, step: usize| (len / 2).next_multiple_of(step);
        while band_m.div_ceil(rows) * band_n.div_ceil(cols) < TILES
            && (rows > I::MR.max(24) || cols > I::NR.max(48))
        {
            if rows * 2 > cols && rows > I::MR.max(24) || cols <= I::NR.max(48) {
                rows = halve(rows, I::MR);
            } else {
                cols = halve(cols, I::NR);
            }
        }
        Self {
            size,
            resident,
            depth,
            depths: k.div_ceil(depth).max(1),
            band,
            bands: wide.div_ceil(band),
            chunk: even(depth, CHUNK, 1),
            tile: (rows, cols),
            panels: (I::A_WIDTH, I::NR),
        }
    }

    /// Number of steps: bands of all depth blocks.
    pub fn steps(&self) -> usize {
        self.depths * self.bands
    }

    /// Inner indices of a depth block: first and number.
    fn depth_block(&self, block: usize) -> (usize, usize) {
        let k = block * self.depth;
        (k, self.depth.min(self.size.k - k))
    }

    /// The parts of A and B that a step multiplies.
    pub fn parts(&self, step: usize) -> (Part, Part) {
        let (k, depth) = self.depth_block(step / self.bands);
        let start = step % self.bands * self.band;
        let whole = |width| Part {
            start: 0,
            width,
            k,
            depth,
        };
        let band = |width: usize| Part {
            start,
            width: self.band.min(width - start),
            k,
            depth,
        };
        match self.resident {
            Role::A => (whole(self.size.m), band(self.size.n)),
            Role::B => (band(self.size.m), whole(self.size.n)),
        }
    }

    /// Floats of the packed resident operand (one depth block) and of one packed band.
    pub fn packed_floats(&self) -> (usize, usize) {
        let a =
            |width: usize| width.div_ceil(self.panels.0) * panel_floats(self.panels.0, self.depth);
        let b =
            |width: usize| width.div_ceil(self.panels.1) * panel_floats(self.panels.1, self.depth);
        match self.resident {
            Role::A => (a(self.size.m), b(self.band)),
            Role::B => (b(self.size.n), a(self.band)),
        }
    }

    /// Whether some chain is interrupted within or between depth blocks.
    pub fn has_partials(&self) -> bool {
        self.depths > 1 || self.chunk < self.depth
    }
}
