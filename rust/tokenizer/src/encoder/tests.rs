use std::collections::BTreeMap;
use std::ops::ControlFlow;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

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

/// The definition, read from the vocabulary itself: look at every pair again after each merge.
fn merge_slowly(vocabulary: &Vocabulary, piece: &[u8]) -> Vec<u32> {
    let tokens = vocabulary.ids();
    let mut ids: Vec<u32> = piece
        .iter()
        .map(|&byte| vocabulary.byte_ids()[usize::from(byte)])
        .collect();
    let merge = |pair: &[u32]| {
        let parts = [pair[0], pair[1]].map(|id| vocabulary.token(id).unwrap());
        let &made = tokens.get(parts.concat().as_slice())?;
        let priority = match vocabulary.rule() {
            MergeRule::Ranks => made as usize,
            MergeRule::Listed { merges, .. } => {
                merges.iter().rposition(|&(l, r)| [l, r] == *pair)?
            }
        };
        Some((priority, made))
    };
    loop {
        let merges = ids.windows(2).enumerate();
        let earliest = merges.filter_map(|(at, pair)| Some((merge(pair)?, at)));
        // The leftmost one among equals.
        let Some(((_, made), at)) = earliest.min_by_key(|&((priority, _), at)| (priority, at))
        else {
            return ids;
        };
        ids.splice(at..at + 2, [made]);
    }
}

/// What [`Encoder::encode`] gives, piece by piece and from scratch.
fn encode_slowly(vocabulary: &Vocabulary, text: &[u8]) -> Vec<u32> {
    let whole_first = !matches!(
        vocabulary.rule(),
        MergeRule::Listed {
            ignore_merges: false,
            ..
        }
    );
    let tokens = vocabulary.ids();
    let pieces = vocabulary.pattern().pieces(text).into_iter();
    let ids = pieces.flat_map(|(start, end)| {
        let piece = &text[start..end];
        match tokens.get(piece) {
            Some(&id) if whole_first => vec![id],
            _ => merge_slowly(vocabulary, piece),
        }
    });
    ids.collect()
}

/// Bytes of Japanese kana and ideographs, of Latin text, and some that are no text.
const FEW_BYTES: &[u8] = b"\xE3\x81\x82\x83\xE4\xB8\x80 ae\0\xFF";

/// A vocabulary grown by joining tokens at random, its ids with gaps and its merges in any order.
fn grown(joins: &[(prop::sample::Index, prop::sample::Index)], rule: u8) -> Vocabulary {
    let mut tokens: BTreeMap<u32, Vec<u8>> = (0..=255u8)
        .map(|byte| (u32::from(byte), vec![byte]))
        .collect();
    let mut usable: Vec<u32> = FEW_BYTES.iter().map(|&byte| u32::from(byte)).collect();
    let mut merges = Vec::new();
    for (left, right) in joins {
        let (left, right) = (*left.get(&usable), *right.get(&usable));
        let token = [&tokens[&left][..], &tokens[&right][..]].concat();
        // Joining the same bytes again is one more merge for the same token.
        if !tokens.values().any(|known| *known == token) {
            let id = 300 + 3 * merges.len() as u32;
            tokens.insert(id, token);
            usable.push(id);
        }
        merges.push((left, right));
    }
    let rule = match rule {
        0 => MergeRule::Ranks,
        rule => {
            if rule == 2 {
                merges.reverse();
            }
            MergeRule::Listed {
                merges,
                ignore_merges: rule == 3,
            }
        }
    };
    Vocabulary::new(Parts {
        pattern: Pattern::Gpt2,
        rule,
        tokens,
        added: Vec::new(),
    })
    .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn ids_follow_the_definition(
        joins in vec(any::<(prop::sample::Index, prop::sample::Index)>(), 0..60),
        rule in 0..4u8,
        few in vec(select(FEW_BYTES), 0..120),
        kana in vec(select(&["\u{3042}", "\u{3043}", "\u{4E00}", "a", " "][..]), 0..150),
        all in vec(any::<u8>(), 0..120),
    ) {
        let vocabulary = grown(&joins, rule);
        let encoder = Encoder::new(&vocabulary);
        let all_bytes: Vec<u8> = (0..=255).collect();
        for text in [few, kana.concat().into_bytes(), all, all_bytes] {
            let expected = encode_slowly(&vocabulary, &text);
            // The second time from memory.
            for _ in 0..2 {
                let ids = encoder.encode(&text, &Matcher::default(), &mut go_on).unwrap();
                prop_assert_eq!(&ids, &expected);
            }
        }
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
fn pieces_are_remembered_until_newer_ones_push_them_out() {
    let mut cache = PieceCache::new();
    let piece = |number: u64| format!("piece {number:09}").into_bytes();
    let key = |number: u64| key_of(&piece(number), 0, 15);
    assert_eq!(cache.get(key(0)), None);
    cache.insert(key(0), &piece(0), &[(1 << 28) - 1, 2, 3]);
    assert_eq!(cache.get(key(0)), Some(([(1 << 28) - 1, 2, 3, 0], 3)));
    assert_eq!(cache.get_stored(key(0), &piece(0)), None);
    // The table grows: what was there stays, until it is as large as it gets.
    for number in 1..20_000 {
        cache.insert(key(number), &piece(number), &[number as u32, 1]);
    }
    let known = |cache: &PieceCache, number: u64| {
        let tokens = cache.get(key(number));
        assert!(tokens.is_none() || tokens == Some(([number as u32, 1, 0, 0], 2)));
        tokens.is_some()
    };
    let kept = (1..20_000).filter(|&number| known(&cache, number)).count();
    assert!(kept > 16_000, "{kept}");
    for number in 20_000..800_000 {
        cache.insert(key(number), &piece(number), &[number as u32, 1]);
        assert!(known(&cache, number));
    }
    let kept = (1..800_000).filter(|&number| known(&cache, number)).count();
    assert!((200_000..=1 << 18).contains(&kept), "{kept}");
}

#[test]
fn stored_pieces_are_remembered_until_the_store_starts_afresh() {
    let mut cache = PieceCache::new();
    // By turns longer than a key, and with more tokens than an entry has room for.
    let piece = |number: u32| match number % 2 {
        0 => format!("a piece that is rather long, number {number}").into_bytes(),
        _ => format!("piece {number}").into_bytes(),
    };
    let tokens = |number: u32| vec![number; if number.is_multiple_of(2) { 2 } else { 7 }];
    let key = |number: u32| key_of(&piece(number), 0, piece(number).len());
    let short = b"short";
    let short_key = key_of(short, 0, short.len());
    cache.insert(short_key, short, &[5]);
    for number in 0..500_000 {
        cache.insert(key(number), &piece(number), &tokens(number));
        let known = cache.get_stored(key(number), &piece(number));
        assert_eq!(known, Some(&tokens(number)[..]));
        assert_eq!(cache.get(key(number)), None);
        if number == 1000 {
            assert_eq!(cache.get(short_key), Some(([5, 0, 0, 0], 1)));
        }
    }
    let kept = (0..500_000).filter(|&number| {
        let known = cache.get_stored(key(number), &piece(number));
        assert!(known.is_none() || known == Some(&tokens(number)[..]));
        known.is_some()
    });
    let kept = kept.count();
    assert!((10_000..200_000).contains(&kept), "{kept}");
    // The same key is not yet the same piece.
    assert!(cache.get_stored(key(499_998), &piece(499_998)).is_some());
    assert_eq!(cache.get_stored(key(499_998), &piece(499_996)), None);
    // What is too long is not kept.
    let endless = [b'x'; 300];
    let endless_key = key_of(&endless, 0, 300);
    cache.insert(endless_key, &endless, &[1]);
    assert_eq!(cache.get(endless_key), None);
    assert_eq!(cache.get_stored(endless_key, &endless), None);
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
