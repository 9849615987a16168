//! Row-major matrix views with a row stride.
//!
//! A view can be cut into disjoint mutable parts by rows and by columns. Parts that lie beside one another interleave in
//! memory, which slices cannot express, so views hold a pointer; the constructors check every extent once.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;

/// Number of elements from the first to one behind the last of a view.
fn extent(rows: usize, cols: usize, stride: usize) -> usize {
    assert!(
        cols <= stride || rows <= 1,
        "matrix view: {cols} columns do not fit in a row stride of {stride}"
    );
    if rows == 0 || cols == 0 {
        return 0;
    }
    (rows - 1)
        .checked_mul(stride)
        .and_then(|start| start.checked_add(cols))
        .expect("matrix view: extent overflows the address space")
}

fn check_range(what: &str, range: &Range<usize>, len: usize) {
    assert!(
        range.start <= range.end && range.end <= len,
        "matrix view: {what} {}..{} out of 0..{len}",
        range.start,
        range.end
    );
}

/// A read-only view of `rows` x `cols` floats, `row_stride` elements from row to row.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    pointer: *const f32,
    rows: usize,
    cols: usize,
    stride: usize,
    life: PhantomData<&'a [f32]>,
}

// SAFETY: a view is a shared borrow of f32.
unsafe impl Send for Mat<'_> {}
// SAFETY: a view is a shared borrow of f32.
unsafe impl Sync for Mat<'_> {}

impl<'a> Mat<'a> {
    /// A view of a contiguous matrix.
    ///
    /// # Panics
    /// If the slice does not have exactly `rows * cols` elements.
    #[must_use]
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(
            Some(data.len()),
            rows.checked_mul(cols),
            "matrix view: {rows} x {cols} over {} floats",
            data.len()
        );
        Self::with_stride(data, rows, cols, cols)
    }

    /// A view whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// If the slice is too short or rows would overlap.
    #[must_use]
    pub fn with_stride(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        let extent = extent(rows, cols, stride);
        assert!(
            extent <= data.len(),
            "matrix view: {rows} x {cols}, stride {stride}, needs {extent} floats of {}",
            data.len()
        );
        Self {
            pointer: data.as_ptr(),
            rows,
            cols,
            stride,
            life: PhantomData,
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub fn num_cols(&self) -> usize {
        self.cols
    }

    /// Elements from one row to the next.
    #[must_use]
    pub fn row_stride(&self) -> usize {
        self.stride
    }

    /// Pointer to the first element (dangling where the view is empty).
    #[must_use]
    pub fn as_ptr(&self) -> *const f32 {
        self.pointer
    }

    /// The view of some rows.
    ///
    /// # Panics
    /// If the range is not within the rows.
    #[must_use]
    pub fn rows(&self, range: Range<usize>) -> Self {
        check_range("rows", &range, self.rows);
        Self {
            pointer: self.at(range.start, 0),
            rows: range.len(),
            ..*self
        }
    }

    /// The view of some columns.
    ///
    /// # Panics
    /// If the range is not within the columns.
    #[must_use]
    pub fn cols(&self, range: Range<usize>) -> Self {
        check_range("columns", &range, self.cols);
        Self {
            pointer: self.at(0, range.start),
            cols: range.len(),
            ..*self
        }
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn row(&self, row: usize) -> &'a [f32] {
        assert!(
            row < self.rows,
            "matrix view: row {row} out of 0..{}",
            self.rows
        );
        // SAFETY: the row lies within the borrowed extent checked by the constructor.
        unsafe { std::slice::from_raw_parts(self.at(row, 0), self.cols) }
    }

    fn at(&self, row: usize, col: usize) -> *const f32 {
        // Wrapping, because an empty view has no memory behind it.
        self.pointer
            .wrapping_add(row.wrapping_mul(self.stride))
            .wrapping_add(col)
    }
}

/// A mutable view of `rows` x `cols` floats, `row_stride` elements from row to row.
#[derive(Debug)]
pub struct MatMut<'a> {
    pointer: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: a view is an exclusive borrow of its elements.
unsafe impl Send for MatMut<'_> {}
// SAFETY: a shared reference to the view gives shared access only.
unsafe impl Sync for MatMut<'_> {}

impl<'a> MatMut<'a> {
    /// A view of a contiguous matrix.
    ///
    /// # Panics
    /// If the slice does not have exactly `rows * cols` elements.
    #[must_use]
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(
            Some(data.len()),
            rows.checked_mul(cols),
            "matrix view: {rows} x {cols} over {} floats",
            data.len()
        );
        Self::with_stride(data, rows, cols, cols)
    }

    /// A view whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// If the slice is too short or rows would overlap.
    #[must_use]
    pub fn with_stride(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        let extent = extent(rows, cols, stride);
        assert!(
            extent <= data.len(),
            "matrix view: {rows} x {cols}, stride {stride}, needs {extent} floats of {}",
            data.len()
        );
        Self {
            pointer: data.as_mut_ptr(),
            rows,
            cols,
            stride,
            life: PhantomData,
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub fn num_cols(&self) -> usize {
        self.cols
    }

    /// Elements from one row to the next.
    #[must_use]
    pub fn row_stride(&self) -> usize {
        self.stride
    }

    /// Pointer to the first element (dangling where the view is empty).
    pub fn as_mut_ptr(&mut self) -> *mut f32 {
        self.pointer
    }

    /// The same view for a shorter time.
    pub fn reborrow(&mut self) -> MatMut<'_> {
        MatMut {
            pointer: self.pointer,
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
            life: PhantomData,
        }
    }

    /// A read-only view of the same elements.
    #[must_use]
    pub fn as_ref(&self) -> Mat<'_> {
        Mat {
            pointer: self.pointer,
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
            life: PhantomData,
        }
    }

    /// The view of some rows.
    ///
    /// # Panics
    /// If the range is not within the rows.
    #[must_use]
    pub fn rows(self, range: Range<usize>) -> Self {
        check_range("rows", &range, self.rows);
        Self {
            pointer: self.at(range.start, 0),
            rows: range.len(),
            ..self
        }
    }

    /// The view of some columns.
    ///
    /// # Panics
    /// If the range is not within the columns.
    #[must_use]
    pub fn cols(self, range: Range<usize>) -> Self {
        check_range("columns", &range, self.cols);
        Self {
            pointer: self.at(0, range.start),
            cols: range.len(),
            ..self
        }
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn row(&self, row: usize) -> &[f32] {
        self.as_ref().row(row)
    }

    /// One row, mutable.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(
            row < self.rows,
            "matrix view: row {row} out of 0..{}",
            self.rows
        );
        // SAFETY: the row lies within the extent that `self` borrows exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.at(row, 0), self.cols) }
    }

    /// All rows, each a mutable slice that lives as long as the view.
    pub fn into_rows(self) -> impl Iterator<Item = &'a mut [f32]> {
        let Self {
            pointer,
            rows,
            cols,
            stride,
            ..
        } = self;
        (0..rows).map(move |row| {
            // SAFETY: rows are disjoint parts of the consumed exclusive view, each given out once.
            unsafe {
                std::slice::from_raw_parts_mut(pointer.wrapping_add(row.wrapping_mul(stride)), cols)
            }
        })
    }

    /// The rows before `row`, and the others.
    ///
    /// # Panics
    /// If `row` exceeds the number of rows.
    #[must_use]
    pub fn split_at_row(self, row: usize) -> (Self, Self) {
        check_range("rows", &(row..self.rows), self.rows);
        let below = Self {
            pointer: self.at(row, 0),
            rows: self.rows - row,
            ..self
        };
        (Self { rows: row, ..self }, below)
    }

    /// The columns before `col`, and the others.
    ///
    /// # Panics
    /// If `col` exceeds the number of columns.
    #[must_use]
    pub fn split_at_col(self, col: usize) -> (Self, Self) {
        check_range("columns", &(col..self.cols), self.cols);
        let right = Self {
            pointer: self.at(0, col),
            cols: self.cols - col,
            ..self
        };
        (Self { cols: col, ..self }, right)
    }

    /// Cuts before each of `cuts` (ascending row indices): one part more than cuts.
    ///
    /// # Panics
    /// If the cuts descend or exceed the number of rows.
    #[must_use]
    pub fn split_rows(self, cuts: &[usize]) -> Vec<Self> {
        let mut parts = Vec::with_capacity(cuts.len() + 1);
        let mut rest = self;
        let mut start = 0;
        for &cut in cuts {
            assert!(
                cut >= start,
                "matrix view: cuts must ascend, {cut} after {start}"
            );
            let (part, below) = rest.split_at_row(cut - start);
            parts.push(part);
            (rest, start) = (below, cut);
        }
        parts.push(rest);
        parts
    }

    /// Cuts before each of the ascending row and column indices; the parts come row by row.
    ///
    /// # Panics
    /// If cuts descend or exceed the matrix.
    #[must_use]
    pub fn split_grid(self, row_cuts: &[usize], col_cuts: &[usize]) -> Vec<Self> {
        let mut parts = Vec::with_capacity((row_cuts.len() + 1) * (col_cuts.len() + 1));
        for band in self.split_rows(row_cuts) {
            let mut rest = band;
            let mut start = 0;
            for &cut in col_cuts {
                assert!(
                    cut >= start,
                    "matrix view: cuts must ascend, {cut} after {start}"
                );
                let (part, right) = rest.split_at_col(cut - start);
                parts.push(part);
                (rest, start) = (right, cut);
            }
            parts.push(rest);
        }
        parts
    }

    /// Sets every element.
    pub fn fill(&mut self, value: f32) {
        for row in 0..self.rows {
            self.row_mut(row).fill(value);
        }
    }

    fn at(&self, row: usize, col: usize) -> *mut f32 {
        self.pointer
            .wrapping_add(row.wrapping_mul(self.stride))
            .wrapping_add(col)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: u16) -> Vec<f32> {
        (0..n).map(f32::from).collect()
    }

    #[test]
    fn views_address_rows_and_columns() {
        let data = numbers(20);
        let m = Mat::with_stride(&data, 4, 3, 5);
        assert_eq!(m.row(2), &[10.0, 11.0, 12.0]);
        assert_eq!(m.rows(1..3).cols(1..3).row(1), &[11.0, 12.0]);
        assert_eq!(m.rows(4..4).num_rows(), 0);
    }

    #[test]
    fn the_last_row_needs_no_full_stride() {
        let data = numbers(13);
        assert_eq!(Mat::with_stride(&data, 3, 3, 5).row(2), &[10.0, 11.0, 12.0]);
        assert!(std::panic::catch_unwind(|| Mat::with_stride(&data, 3, 4, 5)).is_err());
    }

    #[test]
    fn grids_are_disjoint_and_complete() {
        let mut data = vec![0.0; 6 * 7];
        let parts = MatMut::with_stride(&mut data, 6, 5, 7).split_grid(&[1, 4], &[0, 2]);
        assert_eq!(parts.len(), 9);
        for (i, mut part) in parts.into_iter().enumerate() {
            part.fill(1.0 + i as f32);
        }
        let m = Mat::with_stride(&data, 6, 5, 7);
        assert_eq!(m.row(0), &[2.0, 2.0, 3.0, 3.0, 3.0]);
        assert_eq!(m.row(3), &[5.0, 5.0, 6.0, 6.0, 6.0]);
        assert_eq!(m.row(5), &[8.0, 8.0, 9.0, 9.0, 9.0]);
        assert_eq!(&data[5..7], &[0.0, 0.0]);
    }

    #[test]
    fn rows_can_be_written_together() {
        let mut data = vec![0.0; 6];
        let rows: Vec<&mut [f32]> = MatMut::new(&mut data, 3, 2).into_rows().collect();
        for (i, row) in rows.into_iter().enumerate() {
            row.fill(i as f32);
        }
        assert_eq!(data, [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]);
    }

    #[test]
    fn empty_views_are_legal() {
        let mut nothing: [f32; 0] = [];
        assert_eq!(Mat::new(&nothing, 0, 5).num_cols(), 5);
        assert_eq!(Mat::new(&nothing, 5, 0).row(4), &[] as &[f32]);
        let (a, b) = MatMut::new(&mut nothing, 0, 5).split_at_col(2);
        assert_eq!((a.num_cols(), b.num_cols()), (2, 3));
    }

    #[test]
    fn wrong_extents_are_refused() {
        let data = numbers(6);
        let bad: [fn(&[f32]) -> Mat<'_>; 3] = [
            |data| Mat::new(data, 2, 2),
            |data| Mat::with_stride(data, 2, 3, 2),
            |data| Mat::new(data, 2, 3).rows(1..3),
        ];
        for bad in bad {
            assert!(std::panic::catch_unwind(|| bad(&data).num_rows()).is_err());
        }
    }
}
