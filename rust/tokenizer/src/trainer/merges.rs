//! The merge loop.
//!
//! All distinct words lie in one flat array, a separator between them. A token keeps its id in its first slot; a token of several bytes
//! keeps its length, flagged, in its last slot. So the token behind one is found by adding a length, the one before by one read, and
//! a merge touches three slots. Each pair has the list of places where it occurred when it arose; a place that has merged otherwise
//! since no longer shows the two ids and is passed over. New pairs always contain the new token, so the pairs that one merge makes
//! are grouped with counters indexed by the neighbour, and the pair table is asked once per distinct neighbour.
//!
//! A pair's count can only fall after the merge that made it. The heap may therefore hold counts that are too large, never too
//! small, and looking again when a pair comes up is exact.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::hash_map::Entry;

use super::Progress;
use super::pieces::Words;
use crate::byte_level::bytes_in_id_order;
use crate::error::{Result, TokenizerError};
use crate::hashing::FastMap;

/// Ids and lengths are below this bit.
const FLAG: u32 = 1 << 31;

/// Between words.
const SEPARATOR: u32 = u32::MAX;

/// A slot inside a token: neither its first nor its last.
const INSIDE: u32 = u32::MAX - 1;

/// Merges between two calls of the progress callback.
const PROGRESS_EVERY: usize = 64;

/// Learn at most `wanted` merges, as pairs of ids: byte ids in `ByteLevel` order, then one id per merge. Fewer come back where no pair is
/// left that occurs at least `min_frequency` times.
pub(super) fn learn(
    words: Words,
    wanted: usize,
    min_frequency: u64,
    progress: &mut Progress<'_>,
) -> Result<Vec<(u32, u32)>> {
    let mut merger = Merger::new(words)?;
    let mut merges = Vec::with_capacity(wanted.min(1 << 20));
    while merges.len() < wanted {
        if merges.len() % PROGRESS_EVERY == 0 && progress(merges.len(), wanted).is_break() {
            return Err(TokenizerError::Interrupted);
        }
        let Some((left, right)) = merger.merge_next(min_frequency.max(1)) else {
            break;
        };
        merges.push((left, right));
    }
    if progress(merges.len(), wanted).is_break() {
        return Err(TokenizerError::Interrupted);
    }
    Ok(merges)
}

/// A pair and where it occurs.
struct Pair {
    count: u64,
    /// Range in `places`.
    first: usize,
    last: usize,
}

/// A neighbour of merged places, and how often it is there.
#[derive(Clone, Copy, Default)]
struct Neighbour {
    /// Weighted with the counts of the words.
    count: u64,
    places: usize,
    /// Index of the next place to fill.
    cursor: usize,
}

struct Merger {
    /// Slots of all words.
    slots: Vec<u32>,
    /// Word of each slot: [slots].
    word_of: Vec<u32>,
    word_counts: Vec<u64>,
    /// Length in bytes of each token: [ids].
    lengths: Vec<u32>,
    pairs: Vec<Pair>,
    pair_index: FastMap<u64, usize>,
    /// Slots where pairs occur, grouped by pair.
    places: Vec<u32>,
    /// (count, pair, index of the pair): the largest count first, then the smallest pair.
    heap: BinaryHeap<(u64, Reverse<u64>, usize)>,
    /// Counters by neighbour: [ids]; zero between merges.
    before: Vec<Neighbour>,
    after: Vec<Neighbour>,
}

fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

impl Merger {
    fn new(mut words: Words) -> Result<Self> {
        // Frequent words first: their slots are touched most and share cache lines.
        words.sort_unstable_by_key(|&(_, count)| Reverse(count));
        let num_slots = 1 + words
            .iter()
            .map(|(piece, _)| piece.len() + 1)
            .sum::<usize>();
        if num_slots >= INSIDE as usize {
            return Err(TokenizerError::Corpus(format!(
                "the text has {num_slots} bytes of distinct words, more than the {INSIDE} that training can hold: give less text"
            )));
        }
        let mut id_of_byte = [0u32; 256];
        for (id, byte) in (0u32..).zip(bytes_in_id_order()) {
            id_of_byte[usize::from(byte)] = id;
        }
        let mut slots = Vec::with_capacity(num_slots);
        let mut word_of = Vec::with_capacity(num_slots);
        let mut word_counts = Vec::with_capacity(words.len());
        slots.push(SEPARATOR);
        word_of.push(0);
        for (word, (piece, count)) in (0u32..).zip(words) {
            slots.extend(piece.iter().map(|&byte| id_of_byte[usize::from(byte)]));
            slots.push(SEPARATOR);
            word_of.resize(slots.len(), word);
            word_counts.push(count);
        }
        let mut merger = Self {
            slots,
            word_of,
            word_counts,
            lengths: vec![1; 256],
            pairs: Vec::new(),
            pair_index: FastMap::default(),
            places: Vec::new(),
            heap: BinaryHeap::new(),
            before: vec![Neighbour::default(); 256],
            after: vec![Neighbour::default(); 256],
        };
        merger.count_bytes();
        Ok(merger)
    }

    /// The pairs of bytes: count, then sort the places by pair.
    fn count_bytes(&mut self) {
        const BYTES: usize = 256;
        let mut table = vec![Neighbour::default(); BYTES * BYTES];
        let is_pair = |pair: &[u32]| pair[0] != SEPARATOR && pair[1] != SEPARATOR;
        for (place, pair) in self
            .slots
            .windows(2)
            .enumerate()
            .filter(|(_, pair)| is_pair(pair))
        {
            let entry = &mut table[pair[0] as usize * BYTES + pair[1] as usize];
            entry.count += self.word_counts[self.word_of[place] as usize];
            entry.places += 1;
        }
        let mut total = 0;
        for entry in &mut table {
            entry.cursor = total;
            total += entry.places;
        }
        self.places = vec![0; total];
        for (place, pair) in self
            .slots
            .windows(2)
            .enumerate()
            .filter(|(_, pair)| is_pair(pair))
        {
            let entry = &mut table[pair[0] as usize * BYTES + pair[1] as usize];
            self.places[entry.cursor] = place as u32;
            entry.cursor += 1;
        }
        for (index, entry) in table
            .iter()
            .enumerate()
            .filter(|(_, entry)| entry.places > 0)
        {
            self.add_pair((index / BYTES) as u32, (index % BYTES) as u32, *entry);
        }
    }

    /// Register a pair whose places are filled in up to `entry.cursor`.
    fn add_pair(&mut self, left: u32, right: u32, entry: Neighbour) {
        let index = self.pairs.len();
        self.pairs.push(Pair {
            count: entry.count,
            first: entry.cursor - entry.places,
            last: entry.cursor,
        });
        self.pair_index.insert(key(left, right), index);
        self.heap
            .push((entry.count, Reverse(key(left, right)), index));
    }

    /// Merge the best pair everywhere and give it back; `None` when no pair occurs `min_frequency` times.
    fn merge_next(&mut self, min_frequency: u64) -> Option<(u32, u32)> {
        loop {
            let (count, Reverse(pair), index) = self.heap.pop()?;
            let current = self.pairs[index].count;
            if current != count {
                self.heap.push((current, Reverse(pair), index));
                continue;
            }
            if count < min_frequency {
                return None;
            }
            let (left, right) = ((pair >> 32) as u32, pair as u32);
            self.merge(left, right, index);
            return Some((left, right));
        }
    }

    fn merge(&mut self, left: u32, right: u32, index: usize) {
        let new = self.lengths.len() as u32;
        let (left_len, right_len) = (self.lengths[left as usize], self.lengths[right as usize]);
        self.lengths.push(left_len + right_len);
        self.before.push(Neighbour::default());
        self.after.push(Neighbour::default());

        let merged = self.merge_places(left, right, index, new);
        self.pairs[index].count = 0;

        // The new pairs: (x, new) at x, and (new, y) at the new token; (new, new) is counted once, with its left one as x.
        let (mut befores, mut afters) = (Vec::new(), Vec::new());
        for &place in &merged {
            let count = self.word_counts[self.word_of[place] as usize];
            if let Some((x, _)) = self.previous(place) {
                note(&mut self.before, &mut befores, x, count);
            }
            if let Some(y) = self.next(place).filter(|&y| y != new) {
                note(&mut self.after, &mut afters, y, count);
            }
        }
        for (table, touched) in [(&mut self.before, &befores), (&mut self.after, &afters)] {
            for &id in touched {
                let entry = &mut table[id as usize];
                entry.cursor = self.places.len();
                self.places.resize(entry.cursor + entry.places, 0);
            }
        }
        for &place in &merged {
            if let Some((x, start)) = self.previous(place) {
                fill(&mut self.before[x as usize], &mut self.places, start);
            }
            if let Some(y) = self.next(place).filter(|&y| y != new) {
                fill(&mut self.after[y as usize], &mut self.places, place);
            }
        }
        for id in befores {
            let entry = std::mem::take(&mut self.before[id as usize]);
            self.add_pair(id, new, entry);
        }
        for id in afters {
            let entry = std::mem::take(&mut self.after[id as usize]);
            self.add_pair(new, id, entry);
        }
    }

    /// Join the places of a pair, from left to right, and take the pairs that vanish off their counts. Where the new tokens start.
    fn merge_places(&mut self, left: u32, right: u32, index: usize, new: u32) -> Vec<usize> {
        let left_len = self.lengths[left as usize] as usize;
        let new_len = self.lengths[new as usize] as usize;
        let mut merged = Vec::new();
        let (mut befores, mut afters) = (Vec::new(), Vec::new());
        for at in self.pairs[index].first..self.pairs[index].last {
            let place = self.places[at] as usize;
            let middle = place + left_len;
            // Otherwise one of the two tokens is gone: merged elsewhere, or just now into the new token before this place.
            if self.slots[place] != left || self.slots[middle] != right {
                continue;
            }
            let count = self.word_counts[self.word_of[place] as usize];
            // Where the new token stands before, the pair between the two went away when that one was made.
            if let Some((x, _)) = self.previous(place).filter(|&(x, _)| x != new) {
                note(&mut self.before, &mut befores, x, count);
            }
            if let Some(y) = self.next(middle) {
                note(&mut self.after, &mut afters, y, count);
            }
            self.slots[place] = new;
            self.slots[middle] = INSIDE;
            self.slots[place + new_len - 1] = FLAG | new_len as u32;
            merged.push(place);
        }
        for id in befores {
            let gone = std::mem::take(&mut self.before[id as usize]).count;
            self.lower(id, left, gone);
        }
        for id in afters {
            let gone = std::mem::take(&mut self.after[id as usize]).count;
            self.lower(right, id, gone);
        }
        merged
    }

    fn lower(&mut self, left: u32, right: u32, gone: u64) {
        if let Entry::Occupied(entry) = self.pair_index.entry(key(left, right)) {
            let pair = &mut self.pairs[*entry.get()];
            // The pair being merged can be its own neighbour (aaa); its count is set to 0 afterwards.
            pair.count = pair.count.saturating_sub(gone);
        }
    }

    /// The token before the one at `place`, and where it starts.
    fn previous(&self, place: usize) -> Option<(u32, usize)> {
        match self.slots[place - 1] {
            SEPARATOR => None,
            slot if slot & FLAG != 0 => {
                let start = place - (slot & !FLAG) as usize;
                Some((self.slots[start], start))
            }
            id => Some((id, place - 1)),
        }
    }

    /// The token behind the one at `place`.
    fn next(&self, place: usize) -> Option<u32> {
        let len = self.lengths[self.slots[place] as usize] as usize;
        Some(self.slots[place + len]).filter(|&id| id != SEPARATOR)
    }
}

/// Count a neighbour; remember it when it is the first time.
fn note(table: &mut [Neighbour], touched: &mut Vec<u32>, id: u32, count: u64) {
    let entry = &mut table[id as usize];
    if entry.places == 0 {
        touched.push(id);
    }
    entry.count += count;
    entry.places += 1;
}

/// Add a place to a neighbour's list.
fn fill(entry: &mut Neighbour, places: &mut [u32], place: usize) {
    places[entry.cursor] = place as u32;
    entry.cursor += 1;
}
