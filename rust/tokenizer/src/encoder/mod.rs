//! Text -> ids.

mod added_tokens;
mod merging;
mod pair_table;
mod piece_cache;
mod recover;

use std::sync::{Mutex, PoisonError};

pub(crate) use added_tokens::Matcher;
use merging::{Scratch, merge_piece};
use pair_table::PairTable;
use piece_cache::{PieceCache, SHORT_TOKENS, key_of};
pub(crate) use recover::merges_of_ranks;

use crate::error::Result;
use crate::hashing::FastMap;
use crate::parallel::{self, Tick, Ticker};
use crate::splitter::{Cuts, Pattern};
use crate::vocabulary::{MergeRule, Vocabulary};

/// Longer texts are encoded in parts of about this many bytes.
const PART: usize = 256 << 10;

/// Batches below this many bytes are encoded by the calling thread alone.
const PARALLEL_FROM: usize = 64 << 10;

/// Pieces that are cut before they are looked up: a branch that cuts wrongly then delays no look-up, and look-ups wait for memory
/// together.
const GROUP: usize = 128;

/// Turns text into ids. Shared by threads; each call borrows a [`Worker`] with its memory of pieces.
pub(crate) struct Encoder {
    pattern: Pattern,
    table: PairTable,
    byte_ids: [u32; 256],
    /// Tokens by their bytes, where a piece that is a token is taken whole before any merge.
    whole: Option<FastMap<Box<[u8]>, u32>>,
    idle: Mutex<Vec<Worker>>,
}

/// What one thread needs.
struct Worker {
    cache: PieceCache,
    /// Pieces that are looked up next: start, end and key.
    pieces: Vec<(usize, usize, u128)>,
    scratch: Scratch,
    /// Tokens of the piece at hand.
    tokens: Vec<u32>,
}

/// Ids that grow in steps, so that the hot loop can always store a full group.
struct Ids {
    slots: Vec<u32>,
    len: usize,
}

impl Ids {
    /// Room for the ids of this much text, as a first guess.
    fn for_bytes(num_bytes: usize) -> Self {
        Self {
            slots: vec![0; num_bytes / 3 + 2 * SHORT_TOKENS],
            len: 0,
        }
    }

    fn into_vec(mut self) -> Vec<u32> {
        self.slots.truncate(self.len);
        self.slots
    }

    #[inline(always)]
    fn push_group(&mut self, group: [u32; SHORT_TOKENS], count: usize) {
        self.reserve(SHORT_TOKENS);
        self.slots[self.len..self.len + SHORT_TOKENS].copy_from_slice(&group);
        self.len += count;
    }

    fn extend(&mut self, ids: &[u32]) {
        self.reserve(ids.len());
        self.slots[self.len..self.len + ids.len()].copy_from_slice(ids);
        self.len += ids.len();
    }

    #[inline(always)]
    fn reserve(&mut self, count: usize) {
        if self.len + count > self.slots.len() {
            self.grow(count);
        }
    }

    #[cold]
    fn grow(&mut self, count: usize) {
        self.slots
            .resize((self.len + count).max(2 * self.slots.len()), 0);
    }
}

impl Encoder {
    pub fn new(vocabulary: &Vocabulary) -> Self {
        let whole_first = match vocabulary.rule() {
            MergeRule::Listed { ignore_merges, .. } => *ignore_merges,
            MergeRule::Ranks => true,
        };
        let whole = || {
            vocabulary
                .ordinary()
                .map(|(id, token)| (token.into(), id))
                .collect()
        };
        Self {
            pattern: vocabulary.pattern(),
            table: PairTable::new(vocabulary),
            byte_ids: *vocabulary.byte_ids(),
            whole: whole_first.then(whole),
            idle: Mutex::new(Vec::new()),
        }
    }

    /// The ids of one text, with the matcher's tokens found in it.
    pub fn encode(&self, text: &[u8], added: &Matcher, tick: &mut Tick<'_>) -> Result<Vec<u32>> {
        let (ids, _) = self.encode_in_turn(&[text], text.len(), added, &mut Ticker::new(tick))?;
        Ok(ids)
    }

    /// Encode texts one after the other on this thread, straight into one array.
    fn encode_in_turn(
        &self,
        texts: &[&[u8]],
        num_bytes: usize,
        added: &Matcher,
        ticker: &mut Ticker<'_, '_>,
    ) -> Result<(Vec<u32>, Vec<i64>)> {
        let mut ids = Ids::for_bytes(num_bytes);
        let mut offsets = Vec::with_capacity(texts.len() + 1);
        offsets.push(0);
        let mut worker = self.borrow_worker();
        for text in texts {
            if text.len() <= PART {
                self.encode_part(text, added, &mut worker, &mut ids);
                ticker.poll()?;
            } else {
                for part in parts(text, added) {
                    self.encode_part(part, added, &mut worker, &mut ids);
                    ticker.poll()?;
                }
            }
            offsets.push(ids.len as i64);
        }
        self.give_back([worker]);
        Ok((ids.into_vec(), offsets))
    }

    /// The ids of many texts, one after the other, and where each text's ids start: [texts + 1].
    pub fn encode_batch(
        &self,
        texts: &[&[u8]],
        added: &Matcher,
        threads: usize,
        tick: &mut Tick<'_>,
    ) -> Result<(Vec<u32>, Vec<i64>)> {
        let num_bytes: usize = texts.iter().map(|text| text.len()).sum();
        let threads = if num_bytes < PARALLEL_FROM {
            1
        } else {
            threads.max(1)
        };
        let mut ticker = Ticker::new(tick);
        if threads == 1 {
            return self.encode_in_turn(texts, num_bytes, added, &mut ticker);
        }
        let jobs = make_jobs(texts, added);
        let mut workers: Vec<Worker> = (0..threads.min(jobs.len()).max(1))
            .map(|_| self.borrow_worker())
            .collect();
        let encode_job = |worker: &mut Worker, job: &Job<'_>| {
            let mut ids = Ids::for_bytes(job.num_bytes());
            let ends = job.parts.iter().map(|part| {
                self.encode_part(part, added, worker, &mut ids);
                ids.len
            });
            let ends: Vec<usize> = ends.collect();
            (ids.into_vec(), ends)
        };
        let results = parallel::map(&jobs, &mut workers, &mut ticker, encode_job)?;
        self.give_back(workers);

        let total = results.iter().map(|(ids, _)| ids.len()).sum();
        let mut all = Vec::with_capacity(total);
        let mut offsets = vec![0; texts.len() + 1];
        for (job, (ids, ends)) in jobs.iter().zip(results) {
            for (i, end) in ends.iter().enumerate() {
                // The last part of a text sets its end.
                offsets[job.first_text + i + 1] = (all.len() + end) as i64;
            }
            all.extend_from_slice(&ids);
        }
        Ok((all, offsets))
    }

    /// Encode a part of a text that ends where pieces end.
    fn encode_part(&self, text: &[u8], added: &Matcher, worker: &mut Worker, ids: &mut Ids) {
        let mut from = 0;
        while let Some(found) = added.find(text, from) {
            self.encode_stretch(&text[from..found.start], worker, ids);
            ids.extend(&[found.id]);
            from = found.end;
        }
        self.encode_stretch(&text[from..], worker, ids);
    }

    /// Encode text between two added tokens.
    fn encode_stretch(&self, text: &[u8], worker: &mut Worker, ids: &mut Ids) {
        self.pattern.for_each_piece(text, |start, end| {
            worker.pieces.push((start, end, key_of(text, start, end)));
            if worker.pieces.len() == GROUP {
                self.encode_pieces(text, worker, ids);
            }
        });
        self.encode_pieces(text, worker, ids);
    }

    /// Encode and forget `worker.pieces`.
    #[inline(never)]
    fn encode_pieces(&self, text: &[u8], worker: &mut Worker, ids: &mut Ids) {
        let mut pieces = std::mem::take(&mut worker.pieces);
        for &(start, end, key) in &pieces {
            match worker.cache.get(key) {
                Some((tokens, count)) => ids.push_group(tokens, count),
                None => self.encode_uncommon_piece(key, &text[start..end], worker, ids),
            }
        }
        pieces.clear();
        worker.pieces = pieces;
    }

    /// Encode a piece that is new, long or has many tokens.
    #[inline(never)]
    fn encode_uncommon_piece(&self, key: u128, piece: &[u8], worker: &mut Worker, ids: &mut Ids) {
        if let Some(tokens) = worker.cache.get_stored(key, piece) {
            ids.extend(tokens);
            return;
        }
        self.encode_new_piece(piece, worker);
        worker.cache.insert(key, piece, &worker.tokens);
        ids.extend(&worker.tokens);
    }

    /// The tokens of a piece, into `worker.tokens`.
    #[inline(never)]
    fn encode_new_piece(&self, piece: &[u8], worker: &mut Worker) {
        worker.tokens.clear();
        if let Some(&id) = self.whole.as_ref().and_then(|whole| whole.get(piece)) {
            worker.tokens.push(id);
            return;
        }
        merge_piece(
            &self.table,
            &self.byte_ids,
            piece,
            &mut worker.scratch,
            &mut worker.tokens,
        );
    }

    fn borrow_worker(&self) -> Worker {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.pop().unwrap_or_else(|| Worker {
            cache: PieceCache::new(),
            pieces: Vec::with_capacity(GROUP),
            scratch: Scratch::default(),
            tokens: Vec::new(),
        })
    }

    fn give_back(&self, workers: impl IntoIterator<Item = Worker>) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.extend(workers);
    }
}

/// Consecutive parts of texts that one thread encodes in a row: either whole texts, or one part of a long one.
struct Job<'a> {
    first_text: usize,
    parts: Vec<&'a [u8]>,
}

impl Job<'_> {
    fn num_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.len()).sum()
    }
}

fn make_jobs<'a>(texts: &[&'a [u8]], added: &Matcher) -> Vec<Job<'a>> {
    let mut jobs: Vec<Job<'a>> = Vec::new();
    let mut room = 0;
    for (index, text) in texts.iter().enumerate() {
        if text.len() > PART {
            jobs.extend(parts(text, added).map(|part| Job {
                first_text: index,
                parts: vec![part],
            }));
            room = 0;
        } else if let Some(job) = jobs.last_mut().filter(|_| text.len() <= room) {
            job.parts.push(text);
            room -= text.len();
        } else {
            jobs.push(Job {
                first_text: index,
                parts: vec![text],
            });
            room = PART - text.len();
        }
    }
    jobs
}

/// Parts of a text that can be encoded on their own.
fn parts<'a>(text: &'a [u8], added: &Matcher) -> impl Iterator<Item = &'a [u8]> {
    Cuts::new(text, PART, |rest, position| !added.spans(rest, position))
}

#[cfg(test)]
mod tests;
