//! Keys and values of sequences that are being written, in pages of 64 positions that sequences may share.
//!
//! A page holds its positions for all layers, one after the other. A fork shares all pages; a page is copied when one of
//! its owners writes to it while another still holds it.

use std::ops::Range;
use std::sync::Arc;

use ingot_kernels::{AttentionShape, Buffer, Mat, PAGE_POSITIONS, Pool};

/// Makes pages of one size, and keeps those given back for the next sequence.
#[derive(Debug)]
pub(crate) struct PageStore {
    shape: AttentionShape,
    num_layers: usize,
    free: Vec<Buffer>,
}

/// Pages of one sequence, position 0 first.
#[derive(Clone, Debug, Default)]
pub(crate) struct PageTable {
    pages: Vec<Arc<Buffer>>,
}

/// Rows of keys and values that go to positions `positions` of a sequence.
pub(crate) struct NewRows<'a> {
    pub(crate) table: &'a mut PageTable,
    /// Positions in the sequence.
    pub(crate) positions: Range<usize>,
    /// Row of the first of them in the arrays of keys and values.
    pub(crate) first_row: usize,
}

impl PageStore {
    pub(crate) fn new(shape: AttentionShape, num_layers: usize) -> Self {
        Self {
            shape,
            num_layers,
            free: Vec::new(),
        }
    }

    /// Adds pages until the table has room for `length` positions.
    pub(crate) fn reserve(&mut self, table: &mut PageTable, length: usize) {
        while table.pages.len() * PAGE_POSITIONS < length {
            let page = self
                .free
                .pop()
                .unwrap_or_else(|| Buffer::zeroed(self.num_layers * self.shape.page_floats()));
            table.pages.push(Arc::new(page));
        }
    }

    /// Takes back the pages that no other sequence shares.
    pub(crate) fn release(&mut self, table: PageTable) {
        self.free.extend(
            table
                .pages
                .into_iter()
                .filter_map(|page| Arc::try_unwrap(page).ok()),
        );
    }

    /// One layer's part of each page.
    pub(crate) fn layer<'a>(&self, table: &'a PageTable, layer: usize) -> Vec<&'a [f32]> {
        let range = self.layer_range(layer);
        table
            .pages
            .iter()
            .map(|page| &page[range.clone()])
            .collect()
    }

    /// Stores one layer's keys and values, both [R, Hkv h]. The tables must have room for their positions.
    pub(crate) fn write(
        &self,
        pool: &Pool,
        layer: usize,
        rows: Vec<NewRows<'_>>,
        keys: Mat<'_>,
        values: Mat<'_>,
    ) {
        let range = self.layer_range(layer);
        let mut items = Vec::new();
        for NewRows {
            table,
            positions,
            first_row,
        } in rows
        {
            let first_page = positions.start / PAGE_POSITIONS;
            let last_page = positions.end.div_ceil(PAGE_POSITIONS);
            for (number, page) in table
                .pages
                .iter_mut()
                .enumerate()
                .take(last_page)
                .skip(first_page)
            {
                let start = positions.start.max(number * PAGE_POSITIONS);
                let end = positions.end.min((number + 1) * PAGE_POSITIONS);
                // Copies the page first where another sequence shares it.
                let page = &mut Arc::make_mut(page)[range.clone()];
                items.push((page, start..end, first_row + start - positions.start));
            }
        }
        pool.for_each(
            items,
            |(page, positions, first_row): (&mut [f32], Range<usize>, usize)| {
                for (row, position) in (first_row..).zip(positions) {
                    self.shape
                        .write_page(page, position, keys.row(row), values.row(row));
                }
            },
        );
    }

    fn layer_range(&self, layer: usize) -> Range<usize> {
        let floats = self.shape.page_floats();
        layer * floats..(layer + 1) * floats
    }
}
