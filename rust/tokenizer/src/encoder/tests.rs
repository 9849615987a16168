use std::ops::ControlFlow;

use super::*;
use crate::vocabulary::Parts;

fn go_on() -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// All tokens of up to four letters a and b, in an order that makes some of them unreachable by merges.
fn letters(rule: MergeRule) -> Vocabulary {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    tokens.extend([
        b"ab".to_vec(),
        b"bb".to_vec(),
        b"aa".to_vec(),
        b"aab".to_vec(),
        b"abab".to_vec(),
        b"bba".to_vec(),
        b"cac".to_vec(),
    ]);
    Vocabulary::new(Parts {
        pattern: Pattern::Gpt2,
        rule,
        tokens: (0..).zip(tokens).collect(),
        added: Vec::new(),
    })
    .unwrap()
}

fn listed(ignore_merges: bool) -> Vocabulary {
    let id = |text: &[u8]| match text {
        [byte] => u32::from(*byte),
        b"ab" => 256,
        b"bb" => 257,
        _ => 258,
    };
    // aab is made of aa and b only; abab and bba of nothing.
    let merges = vec![
        (id(b"a"), id(b"b")),
        (id(b"b"), id(b"b")),
        (id(b"a"), id(b"a")),
        (id(b"aa"), id(b"b")),
    ];
    letters(MergeRule::Listed {
        merges,
        ignore_merges,
    })
}

/// The definition: look at every pair again after each merge.
fn merge_slowly(vocabulary: &Vocabulary, piece: &[u8]) -> Vec<u32> {
    let table = PairTable::new(vocabulary);
    let mut ids: Vec<u32> = piece
        .iter()
        .map(|&byte| vocabulary.byte_ids()[usize::from(byte)])
        .collect();
    loop {
        let merges = ids
            .windows(2)
            .enumerate()
            .map(|(i, pair)| (table.get(pair[0], pair[1]), i));
        let Some((merge, at)) = merges.min().filter(|&(merge, _)| merge != pair_table::NONE) else {
            return ids;
        };
        ids.splice(at..at + 2, [pair_table::made(merge)]);
    }
}

/// Letters a, b and c from a small generator.
fn random_letters(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        b"abc"[(state >> 33) as usize % 3]
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn scan_and_heap_follow_the_definition() {
    for vocabulary in [letters(MergeRule::Ranks), listed(false)] {
        let encoder = Encoder::new(&vocabulary);
        let mut scratch = Scratch::default();
        for (seed, len) in (0..400u64).zip((1..=100).cycle()) {
            let piece = random_letters(seed, len);
            let mut ids = Vec::new();
            merge_piece(
                &encoder.table,
                &encoder.byte_ids,
                &piece,
                &mut scratch,
                &mut ids,
            );
            assert_eq!(
                ids,
                merge_slowly(&vocabulary, &piece),
                "{}",
                String::from_utf8_lossy(&piece)
            );
        }
    }
}

#[test]
fn the_two_rules_differ_where_a_token_is_not_listed() {
    let encode = |vocabulary: &Vocabulary, text: &[u8]| {
        Encoder::new(vocabulary)
            .encode(text, &Matcher::default(), &mut go_on)
            .unwrap()
    };
    assert_eq!(encode(&letters(MergeRule::Ranks), b"abab"), [260]);
    assert_eq!(encode(&listed(false), b"abab"), [256, 256]);
    assert_eq!(encode(&listed(true), b"abab"), [260]);
    // Only as a whole piece.
    assert_eq!(encode(&listed(true), b"ababc"), [256, 256, 99]);
    assert_eq!(encode(&letters(MergeRule::Ranks), b"ababc"), [260, 99]);
}

#[test]
fn merges_come_back_from_ranks_only_where_every_token_is_one_merge() {
    assert_eq!(merges_of_ranks(&letters(MergeRule::Ranks)), None);
    let merges = vec![(0, 1), (256, 2), (256, 257)];
    let own = Vocabulary::from_merges(Pattern::Gpt2, merges.clone(), &[]).unwrap();
    assert_eq!(merges_of_ranks(&own), Some(merges));
}

#[test]
fn the_cache_gives_back_what_it_was_given() {
    let mut cache = PieceCache::new();
    let key = short_key(b"piece of text that goes on", 0, 15);
    let set = PieceCache::set_of(key);
    assert_eq!(cache.get_short(set, key), None);
    cache.insert_short(set, key, &[(1 << 28) - 1, 2, 3]);
    assert_eq!(
        cache.get_short(set, key),
        Some(([(1 << 28) - 1, 2, 3, 0], 3))
    );
    // Five tokens have no room, and a set has room for two pieces: the third pushes the first out.
    cache.insert_short(set, key + 1, &[1, 2, 3, 4, 5]);
    assert_eq!(cache.get_short(set, key + 1), None);
    cache.insert_short(set, key + 2, &[7]);
    assert_eq!(cache.get_short(set, key).map(|(_, count)| count), Some(3));
    cache.insert_short(set, key + 3, &[8]);
    assert_eq!(cache.get_short(set, key), None);
    assert_eq!(cache.get_short(set, key + 3), Some(([8, 0, 0, 0], 1)));
}

#[test]
fn long_pieces_survive_until_the_table_starts_afresh() {
    let mut cache = PieceCache::new();
    let mut out = Vec::new();
    for round in 0..30_000u32 {
        let piece = format!("a piece that is rather long, number {round}");
        cache.insert_long(piece.as_bytes(), &[round, 1]);
        out.clear();
        assert!(cache.get_long(piece.as_bytes(), &mut out));
        assert_eq!(out, [round, 1]);
    }
    assert!(!cache.get_long(b"a piece that was never there", &mut out));
    cache.insert_long(&[b'x'; 300], &[1]);
    assert!(!cache.get_long(&[b'x'; 300], &mut out));
}

#[test]
fn a_stop_is_honoured_in_long_texts() {
    let vocabulary = Vocabulary::bytes_only(Pattern::Gpt2);
    let text = random_letters(1, 40 << 20);
    let spaced: Vec<u8> = text
        .chunks(50)
        .flat_map(|word| [word, b" "].concat())
        .collect();
    let encoder = Encoder::new(&vocabulary);
    let stopped = encoder.encode(&spaced, &Matcher::default(), &mut || ControlFlow::Break(()));
    assert!(matches!(stopped, Err(crate::TokenizerError::Interrupted)));
}
