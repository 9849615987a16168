//! Counting pieces: all that training keeps of a text. Memory grows with distinct pieces, not with the text.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use crate::error::{Result, TokenizerError};
use crate::hashing::{FastMap, hash_u128};
use crate::parallel::{self, Tick, Ticker};
use crate::piece_key::{SHORT_PIECE, short_key, short_piece};
use crate::splitter::{Cuts, Pattern, last_cut};

/// Bytes that one thread counts in a row.
const PART: usize = 1 << 20;

/// Bytes read from a file at once, per thread.
const BLOCK: usize = 4 << 20;

/// Distinct pieces and how often each occurs.
pub(super) type Words = Vec<(Box<[u8]>, u64)>;

/// Counts the pieces of documents. No piece crosses from one document into another.
pub struct PieceCounter {
    pattern: Pattern,
    tables: Vec<Table>,
    num_bytes: u64,
}

impl PieceCounter {
    /// Count pieces of `pattern` with this many threads. Counts do not depend on the number of threads.
    pub fn new(pattern: Pattern, threads: usize) -> Self {
        Self {
            pattern,
            tables: (0..threads.max(1)).map(|_| Table::default()).collect(),
            num_bytes: 0,
        }
    }

    /// How text is cut.
    pub fn pattern(&self) -> Pattern {
        self.pattern
    }

    /// Bytes counted so far.
    pub fn num_bytes(&self) -> u64 {
        self.num_bytes
    }

    /// Count the pieces of each document.
    ///
    /// # Errors
    /// `tick` asked to stop; what was counted until then stays counted.
    pub fn add_documents(&mut self, documents: &[&[u8]], tick: &mut Tick<'_>) -> Result<()> {
        let mut ticker = Ticker::new(tick);
        self.add(documents, &mut ticker)
    }

    fn add(&mut self, documents: &[&[u8]], ticker: &mut Ticker<'_, '_>) -> Result<()> {
        // One item: several short documents, or a part of a long one.
        let mut items: Vec<Vec<&[u8]>> = Vec::new();
        let mut room = 0;
        for &document in documents {
            self.num_bytes += document.len() as u64;
            if document.len() > PART {
                items.extend(Cuts::new(document, PART, |_, _| true).map(|part| vec![part]));
                room = 0;
            } else if let Some(item) = items.last_mut().filter(|_| document.len() <= room) {
                item.push(document);
                room -= document.len();
            } else {
                items.push(vec![document]);
                room = PART - document.len();
            }
        }
        let pattern = self.pattern;
        parallel::map(&items, &mut self.tables, ticker, |table, item| {
            for text in item {
                pattern.for_each_piece(text, |start, end| table.add(text, start, end));
            }
        })?;
        Ok(())
    }

    /// Count the pieces of a file, which is one document, reading it block by block.
    ///
    /// # Errors
    /// The file cannot be read, or `tick` asked to stop.
    pub fn add_file(&mut self, path: &Path, tick: &mut Tick<'_>) -> Result<()> {
        let mut ticker = Ticker::new(tick);
        let block = BLOCK * self.tables.len();
        let mut blocks = Blocks::open(path, block)?;
        while let Some(text) = blocks.next_block(|_, _| true)? {
            self.add(&[text], &mut ticker)?;
            ticker.poll()?;
        }
        Ok(())
    }

    /// Distinct pieces with their counts, in no particular order.
    pub(super) fn into_words(self) -> Words {
        let mut tables = self.tables.into_iter();
        let mut all = tables.next().unwrap_or_default();
        for table in tables {
            all.merge(table);
        }
        all.into_words()
    }
}

/// A file in blocks that can be split into pieces one by one.
pub(crate) struct Blocks<'a> {
    path: &'a Path,
    file: File,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were handed out.
    used: usize,
    size: usize,
    at_end: bool,
}

impl<'a> Blocks<'a> {
    /// Read `path` in blocks of about `size` bytes; more only where there is no place to cut.
    pub fn open(path: &'a Path, size: usize) -> Result<Self> {
        let file = File::open(path).map_err(|error| TokenizerError::io(path, error))?;
        Ok(Self {
            path,
            file,
            buffer: Vec::new(),
            used: 0,
            size,
            at_end: false,
        })
    }

    /// The next block; `None` at the end. `allowed(text, position)` may refuse a cut.
    pub fn next_block(
        &mut self,
        mut allowed: impl FnMut(&[u8], usize) -> bool,
    ) -> Result<Option<&[u8]>> {
        self.buffer.drain(..self.used);
        self.used = 0;
        let mut wanted = self.size;
        loop {
            self.fill(wanted)?;
            if self.at_end {
                self.used = self.buffer.len();
                break;
            }
            let text = &self.buffer;
            if let Some(cut) = last_cut(text, text.len(), |position| allowed(text, position)) {
                self.used = cut;
                break;
            }
            wanted *= 2;
        }
        Ok((self.used > 0).then(|| &self.buffer[..self.used]))
    }

    fn fill(&mut self, wanted: usize) -> Result<()> {
        while self.buffer.len() < wanted && !self.at_end {
            let len = self.buffer.len();
            self.buffer.resize(wanted, 0);
            let read = match self.file.read(&mut self.buffer[len..]) {
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {
                    self.buffer.truncate(len);
                    continue;
                }
                Err(error) => return Err(TokenizerError::io(self.path, error)),
            };
            self.at_end = read == 0;
            self.buffer.truncate(len + read);
        }
        Ok(())
    }
}

/// Counts of one thread.
#[derive(Default)]
struct Table {
    /// Open addressing, at most half full: key (bytes and length; 0 = empty) and count.
    short: Vec<(u128, u64)>,
    num_short: usize,
    long: FastMap<Box<[u8]>, u64>,
}

impl Table {
    #[inline(always)]
    fn add(&mut self, text: &[u8], start: usize, end: usize) {
        if end - start <= SHORT_PIECE {
            self.add_short(short_key(text, start, end), 1);
        } else {
            self.add_long(&text[start..end], 1);
        }
    }

    #[inline(always)]
    fn add_short(&mut self, key: u128, count: u64) {
        if 2 * self.num_short >= self.short.len() {
            self.grow();
        }
        let index = self.slot(key);
        let slot = &mut self.short[index];
        if slot.0 == 0 {
            slot.0 = key;
            self.num_short += 1;
        }
        slot.1 += count;
    }

    /// Where `key` is, or should go.
    #[inline(always)]
    fn slot(&self, key: u128) -> usize {
        let mask = self.short.len() - 1;
        let mut index = hash_u128(key) as usize & mask;
        while self.short[index].0 != key && self.short[index].0 != 0 {
            index = (index + 1) & mask;
        }
        index
    }

    #[cold]
    fn grow(&mut self) {
        let size = (2 * self.short.len()).max(1 << 12);
        let old = std::mem::replace(&mut self.short, vec![(0, 0); size]);
        for entry in old {
            if entry.0 != 0 {
                let index = self.slot(entry.0);
                self.short[index] = entry;
            }
        }
    }

    fn add_long(&mut self, piece: &[u8], count: u64) {
        if let Some(known) = self.long.get_mut(piece) {
            *known += count;
        } else {
            self.long.insert(piece.into(), count);
        }
    }

    fn merge(&mut self, other: Self) {
        for (key, count) in other.short {
            if key != 0 {
                self.add_short(key, count);
            }
        }
        for (piece, count) in other.long {
            *self.long.entry(piece).or_insert(0) += count;
        }
    }

    fn into_words(self) -> Words {
        let short = self.short.into_iter().filter(|&(key, _)| key != 0);
        let mut words: Words = short
            .map(|(key, count)| (short_piece(key), count))
            .collect();
        words.extend(self.long);
        words
    }
}
