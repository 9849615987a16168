//! Text -> pieces. A merge never crosses the border of a piece.
//!
//! The patterns are those of published tokenizers, each a regular expression in its own files; here each is a small hand-written
//! machine that looks at a character once (three times in a run of white space), so that any input takes linear time and constant stack.
//! Input is bytes: what is no valid UTF-8 counts byte by byte as class "other".

mod cl100k;
mod cuts;
mod gpt2;
mod runs;

pub use cuts::{Cuts, last_cut};

use crate::error::{Result, TokenizerError};

/// How text is cut into pieces.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Pattern {
    /// GPT-2: words with the space before them, case-sensitive contractions.
    Gpt2,
    /// cl100k as tiktoken 0.14 has it: up to three digits, any one character before a word, and white space at the end of the text is
    /// one piece, newlines included.
    Cl100k,
    /// Llama 3, and cl100k before tiktoken's rewrite: white space at the end of the text is cut after its last newline as elsewhere.
    Llama3,
    /// Qwen 2 and 3: as Llama 3 but each digit alone.
    Qwen2,
    /// `SmolLM2` and `StarCoder`: each digit alone, then GPT-2's pattern on what lies between digits.
    Smollm,
}

/// GPT-2's regular expression as Hugging Face's `ByteLevel` has it built in.
const GPT2_REGEX: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const LLAMA3_REGEX: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// cl100k in a form that Oniguruma (the engine of tokenizers) reads as tiktoken's engine reads tiktoken's: `$` means the end of a line
/// there, and `{1,3}+` is not possessive.
const CL100K_REGEX: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]+|\s+(?!\S)|\s+";

const QWEN2_REGEX: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Other spellings of the same patterns, found in published files.
const OTHER_SPELLINGS: &[(&str, Pattern)] = &[
    (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        Pattern::Gpt2,
    ),
    (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        Pattern::Gpt2,
    ),
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        Pattern::Cl100k,
    ),
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        Pattern::Llama3,
    ),
];

impl Pattern {
    /// All patterns.
    pub const ALL: [Self; 5] = [
        Self::Gpt2,
        Self::Cl100k,
        Self::Llama3,
        Self::Qwen2,
        Self::Smollm,
    ];

    /// The name that users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpt2 => "gpt2",
            Self::Cl100k => "cl100k",
            Self::Llama3 => "llama3",
            Self::Qwen2 => "qwen2",
            Self::Smollm => "smollm",
        }
    }

    /// The pattern of this name.
    ///
    /// # Errors
    /// An unknown name; the message suggests the nearest one.
    pub fn parse(name: &str) -> Result<Self> {
        if let Some(pattern) = Self::ALL.into_iter().find(|p| p.name() == name) {
            return Ok(pattern);
        }
        let nearest = Self::ALL
            .into_iter()
            .min_by_key(|p| edit_distance(p.name(), name));
        let names = Self::ALL.map(Self::name).join(", ");
        let hint = nearest.map_or("", Self::name);
        Err(TokenizerError::Setting(format!(
            "unknown pattern {name:?}: did you mean {hint:?}? Patterns are {names}"
        )))
    }

    /// The pattern with this regular expression, spelled as in a published file.
    pub fn from_regex(regex: &str) -> Option<Self> {
        [Self::Gpt2, Self::Cl100k, Self::Llama3, Self::Qwen2]
            .into_iter()
            .find(|p| p.regex() == regex)
            .or_else(|| {
                let known = OTHER_SPELLINGS.iter().find(|(other, _)| *other == regex);
                known.map(|&(_, pattern)| pattern)
            })
    }

    /// The pattern as a regular expression that Hugging Face's tokenizers read. For [`Pattern::Smollm`] it applies between the digits.
    pub fn regex(self) -> &'static str {
        match self {
            Self::Gpt2 | Self::Smollm => GPT2_REGEX,
            Self::Cl100k => CL100K_REGEX,
            Self::Llama3 => LLAMA3_REGEX,
            Self::Qwen2 => QWEN2_REGEX,
        }
    }

    /// Call `visit(start, end)` for each piece of `text` in order. Pieces are not empty and cover the text.
    #[inline]
    pub fn for_each_piece(self, text: &[u8], mut visit: impl FnMut(usize, usize)) {
        match self {
            Self::Gpt2 => walk(text, 0, text.len(), gpt2::piece_end, &mut visit),
            Self::Cl100k => walk(
                text,
                0,
                text.len(),
                cl100k::piece_end::<3, true>,
                &mut visit,
            ),
            Self::Llama3 => walk(
                text,
                0,
                text.len(),
                cl100k::piece_end::<3, false>,
                &mut visit,
            ),
            Self::Qwen2 => walk(
                text,
                0,
                text.len(),
                cl100k::piece_end::<1, false>,
                &mut visit,
            ),
            Self::Smollm => {
                // What lies between two digits is cut as if it were a text of its own.
                runs::for_each_digit(text, |start, digit, after| {
                    walk(text, start, digit, gpt2::piece_end, &mut visit);
                    if digit < after {
                        visit(digit, after);
                    }
                });
            }
        }
    }

    /// The pieces of `text` as (start, end) pairs.
    pub fn pieces(self, text: &[u8]) -> Vec<(usize, usize)> {
        let mut pieces = Vec::new();
        self.for_each_piece(text, |start, end| pieces.push((start, end)));
        pieces
    }
}

/// Cut `text[from..to]` with a machine that gives the end of the piece at a position.
#[inline(always)]
fn walk(
    text: &[u8],
    from: usize,
    to: usize,
    piece_end: impl Fn(&[u8], usize) -> usize,
    visit: &mut impl FnMut(usize, usize),
) {
    let text = &text[..to];
    let mut start = from;
    while start < to {
        let end = piece_end(text, start);
        visit(start, end);
        start = end;
    }
}

/// Levenshtein distance, to suggest the nearest name.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(pattern: Pattern, text: &str) -> Vec<&str> {
        let pieces = pattern.pieces(text.as_bytes());
        pieces.into_iter().map(|(a, b)| &text[a..b]).collect()
    }

    #[test]
    fn gpt2_cuts_words_with_their_space() {
        let text = "Hello  world's it'S 42\n\n x\t y!!'s  ";
        let expected = [
            "Hello", " ", " world", "'s", " it", "'", "S", " 42", "\n\n", " x", "\t", " y", "!!'",
            "s", "  ",
        ];
        assert_eq!(cut(Pattern::Gpt2, text), expected);
    }

    #[test]
    fn cl100k_glues_one_character_to_a_word_and_newlines_to_punctuation() {
        let text = "(word) IT'S x'ſa 12345 !\r\n\n  \n  x";
        let expected = [
            "(word", ")", " IT", "'S", " x", "'ſ", "a", " ", "123", "45", " !\r\n\n", "  \n", " ",
            " x",
        ];
        assert_eq!(cut(Pattern::Cl100k, text), expected);
        assert_eq!(cut(Pattern::Llama3, text), expected);
    }

    #[test]
    fn the_end_of_the_text_differs_between_cl100k_and_llama3() {
        assert_eq!(cut(Pattern::Cl100k, "a\n  "), ["a", "\n  "]);
        assert_eq!(cut(Pattern::Llama3, "a\n  "), ["a", "\n", "  "]);
    }

    #[test]
    fn digits_stand_alone_in_qwen2_and_smollm() {
        assert_eq!(cut(Pattern::Qwen2, "a 12"), ["a", " ", "1", "2"]);
        assert_eq!(
            cut(Pattern::Smollm, "a  12b c"),
            ["a", "  ", "1", "2", "b", " c"]
        );
    }

    #[test]
    fn unknown_names_suggest_the_nearest() {
        let message = Pattern::parse("lama3").unwrap_err().to_string();
        assert!(message.contains("did you mean \"llama3\""), "{message}");
    }

    #[test]
    fn every_spelling_is_recognised() {
        for pattern in [
            Pattern::Gpt2,
            Pattern::Cl100k,
            Pattern::Llama3,
            Pattern::Qwen2,
        ] {
            assert_eq!(Pattern::from_regex(pattern.regex()), Some(pattern));
        }
        for &(regex, pattern) in OTHER_SPELLINGS {
            assert_eq!(Pattern::from_regex(regex), Some(pattern));
        }
        assert_eq!(Pattern::from_regex(r"\w+"), None);
    }
}
