//! What holds for any bytes at all.

use std::ops::ControlFlow;

use ingot_tokenizer::splitter::{Cuts, last_cut};
use ingot_tokenizer::{Pattern, PieceCounter, Specials, Tokenizer, TrainOptions, train};
use proptest::prelude::*;

fn go_on() -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Bytes made of what the patterns look at, with some that are no text.
fn tricky_bytes() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        4 => "[ \t\r\n'a-zA-Z0-9.,!]{1,6}".prop_map(String::into_bytes),
        1 => "\\PC{1,3}".prop_map(String::into_bytes),
        1 => prop::collection::vec(any::<u8>(), 1..4),
        1 => prop::sample::select(vec!["'ll", "'\u{17f}", "\u{a0}", "\u{3000}\n", "中文", "२३", "<|end|>", "<|"])
            .prop_map(|text| text.as_bytes().to_vec()),
    ];
    prop::collection::vec(part, 0..30).prop_map(|parts| parts.concat())
}

fn any_pattern() -> impl Strategy<Value = Pattern> {
    prop::sample::select(Pattern::ALL.to_vec())
}

fn small_tokenizer(pattern: Pattern) -> Tokenizer {
    let mut counter = PieceCounter::new(pattern, 1);
    let text = "the cat sat on the mat, it's 1234 o'clock; 中文 中文! \n\n  the end\r\n".repeat(4);
    counter
        .add_documents(&[text.as_bytes()], &mut go_on)
        .unwrap();
    let options = TrainOptions {
        vocab_size: 256 + 20 + 1,
        special_tokens: vec!["<|end|>".to_owned()],
        min_frequency: 0,
    };
    Tokenizer::new(train(counter, &options, &mut |_, _| ControlFlow::Continue(())).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pieces_cover_the_text(pattern in any_pattern(), text in tricky_bytes()) {
        let mut position = 0;
        for (start, end) in pattern.pieces(&text) {
            prop_assert_eq!(start, position);
            prop_assert!(end > start);
            position = end;
        }
        prop_assert_eq!(position, text.len());
    }

    #[test]
    fn a_text_may_be_cut_where_last_cut_says(pattern in any_pattern(), text in tricky_bytes()) {
        let whole = pattern.pieces(&text);
        let mut limit = text.len();
        while let Some(cut) = last_cut(&text, limit, |_| true) {
            let mut parts = pattern.pieces(&text[..cut]);
            parts.extend(pattern.pieces(&text[cut..]).iter().map(|&(start, end)| (start + cut, end + cut)));
            prop_assert_eq!(&parts, &whole, "cut at {}", cut);
            limit = cut - 1;
        }
    }

    #[test]
    fn a_cut_does_not_depend_on_what_is_not_read_yet(text in tricky_bytes(), seen in 0usize..200) {
        let seen = seen.min(text.len());
        let early = last_cut(&text[..seen], seen, |_| true);
        if let Some(cut) = early {
            prop_assert_eq!(last_cut(&text, cut, |_| true), Some(cut));
        }
    }

    #[test]
    fn parts_make_up_the_text(pattern in any_pattern(), text in tricky_bytes(), size in 1usize..20) {
        let parts: Vec<&[u8]> = Cuts::new(&text, size, |_, _| true).collect();
        prop_assert_eq!(parts.concat(), text.clone());
        let pieces: usize = parts.iter().map(|part| pattern.pieces(part).len()).sum();
        prop_assert_eq!(pieces, pattern.pieces(&text).len());
    }

    #[test]
    fn any_bytes_come_back(pattern in any_pattern(), texts in prop::collection::vec(tricky_bytes(), 0..6), threads in 1usize..4) {
        let tokenizer = small_tokenizer(pattern);
        let policy = tokenizer.special_policy(&Specials::All, &Specials::All);
        let views: Vec<&[u8]> = texts.iter().map(Vec::as_slice).collect();
        let (ids, offsets) = tokenizer.encode_batch(&views, &policy, threads, &mut go_on).unwrap();
        for (text, ends) in texts.iter().zip(offsets.windows(2)) {
            let own = &ids[ends[0] as usize..ends[1] as usize];
            prop_assert_eq!(own, tokenizer.encode(text, &policy, &mut go_on).unwrap());
            prop_assert_eq!(&tokenizer.decode(own.iter().map(|&id| i64::from(id))).unwrap(), text);
            let ordinary = tokenizer.encode_ordinary(text, &mut go_on).unwrap();
            prop_assert!(!ordinary.contains(&276));
        }
    }

    #[test]
    fn damaged_files_are_errors(position in 0usize..20_000, byte in any::<u8>()) {
        let (_, mut contents) = small_tokenizer(Pattern::Llama3).contents().unwrap();
        let position = position % contents.len();
        contents[position] = byte;
        // Whatever comes of it, it is no panic; and what still loads, works.
        if let Ok(tokenizer) = Tokenizer::from_json(&contents) {
            let ids = tokenizer.encode_ordinary(b"the cat sat", &mut go_on).unwrap();
            prop_assert!(tokenizer.decode(ids.into_iter().map(i64::from)).is_ok());
        }
    }
}
