use std::collections::HashMap;
use std::ops::ControlFlow;

use super::*;
use crate::byte_level::bytes_in_id_order;

/// Count every pair again before each merge.
fn learn_slowly(words: &[(Box<[u8]>, u64)], wanted: usize, min_frequency: u64) -> Vec<(u32, u32)> {
    let order = bytes_in_id_order();
    let id_of = |byte: u8| order.iter().position(|&b| b == byte).unwrap() as u32;
    let mut words: Vec<(Vec<u32>, u64)> = words
        .iter()
        .map(|(piece, count)| (piece.iter().map(|&byte| id_of(byte)).collect(), *count))
        .collect();
    let mut merges = Vec::new();
    while merges.len() < wanted {
        let mut counts: HashMap<(u32, u32), u64> = HashMap::new();
        for (word, count) in &words {
            for pair in word.windows(2) {
                *counts.entry((pair[0], pair[1])).or_default() += count;
            }
        }
        let best = counts.iter().max_by(|a, b| a.1.cmp(b.1).then(b.0.cmp(a.0)));
        let Some((&pair, _)) = best.filter(|&(_, &count)| count >= min_frequency.max(1)) else {
            break;
        };
        for (word, _) in &mut words {
            let mut i = 0;
            while i + 1 < word.len() {
                if (word[i], word[i + 1]) == pair {
                    word.splice(i..i + 2, [256 + merges.len() as u32]);
                }
                i += 1;
            }
        }
        merges.push(pair);
    }
    merges
}

fn learn(words: &[(Box<[u8]>, u64)], wanted: usize, min_frequency: u64) -> Vec<(u32, u32)> {
    merges::learn(words.to_vec(), wanted, min_frequency, &mut |_, _| {
        ControlFlow::Continue(())
    })
    .unwrap()
}

fn word(text: &str, count: u64) -> (Box<[u8]>, u64) {
    (text.as_bytes().into(), count)
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { failure_persistence: None, ..Default::default() })]

    #[test]
    fn merges_follow_the_definition(
        words in proptest::collection::vec(("[abc]{1,14}", 1u64..6), 1..20),
        min_frequency in 0u64..4,
    ) {
        let words: Vec<_> = words.iter().map(|(text, count)| word(text, *count)).collect();
        proptest::prop_assert_eq!(learn(&words, 60, min_frequency), learn_slowly(&words, 60, min_frequency));
    }
}

#[test]
fn counts_beyond_32_bits_decide() {
    let words = [
        word("ab", 5_000_000_000),
        word("cd", 5_000_000_001),
        word("ef", 1 << 31),
        word("gh", (1 << 32) + 1),
    ];
    let merges = learn(&words, 4, 0);
    assert_eq!(merges, learn_slowly(&words, 4, 0));
    let first = u32::from(b'c' - b'!');
    assert_eq!(merges[0], (first, first + 1));
}

#[test]
fn progress_can_stop_the_merges() {
    let words = vec![word("abcdefgh", 1)];
    let stopped = merges::learn(words, 5, 0, &mut |_, _| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(TokenizerError::Interrupted)));
}

#[test]
fn a_vocabulary_larger_than_the_text_gives_names_the_largest() {
    let mut counter = PieceCounter::new(Pattern::Gpt2, 2);
    counter
        .add_documents(&[b"abab"], &mut || ControlFlow::Continue(()))
        .unwrap();
    let options = TrainOptions {
        vocab_size: 300,
        special_tokens: vec!["<|endoftext|>".to_owned()],
        min_frequency: 0,
    };
    let message = train(counter, &options, &mut |_, _| ControlFlow::Continue(()))
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("only 2 merges are possible, so the largest vocab_size is 259"),
        "{message}"
    );
}

#[test]
fn short_and_long_pieces_are_counted_alike() {
    let mut counter = PieceCounter::new(Pattern::Gpt2, 3);
    let long = "x".repeat(40);
    let text = format!("word {long} word fifteen-letters {long}").repeat(3);
    let documents: Vec<&[u8]> = vec![text.as_bytes(); 7];
    counter
        .add_documents(&documents, &mut || ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(counter.num_bytes(), 7 * text.len() as u64);
    let mut counted: Vec<(Box<[u8]>, u64)> = counter.into_words();
    counted.sort();
    let mut expected: HashMap<Box<[u8]>, u64> = HashMap::new();
    for (start, end) in Pattern::Gpt2.pieces(text.as_bytes()) {
        *expected
            .entry(text.as_bytes()[start..end].into())
            .or_default() += 7;
    }
    let mut expected: Vec<_> = expected.into_iter().collect();
    expected.sort();
    assert_eq!(counted, expected);
}
