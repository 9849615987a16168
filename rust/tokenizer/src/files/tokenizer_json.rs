//! Hugging Face's `tokenizer.json`.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Value, json};

use super::AtomicFile;
use crate::byte_level::Alphabet;
use crate::error::{Result, TokenizerError};
use crate::splitter::Pattern;
use crate::vocabulary::{AddedToken, MergeRule, Parts, Vocabulary};

/// A vocabulary, and what else its file says that has no influence on ids of text.
pub struct TokenizerJson {
    /// The vocabulary.
    pub vocabulary: Vocabulary,
    /// Adds special tokens around texts when `tokenizers` is asked for them; kept as it is.
    pub post_processor: Option<Value>,
}

/// Read a file.
///
/// # Errors
/// The file cannot be read, is damaged, or needs what is not supported; the message says which part.
pub fn load(path: &Path) -> Result<TokenizerJson> {
    let text = fs::read(path).map_err(|error| TokenizerError::io(path, error))?;
    parse(&text).map_err(|error| match error {
        TokenizerError::Vocabulary(message) | TokenizerError::Setting(message) => {
            TokenizerError::file(path, message)
        }
        other => other,
    })
}

/// Write a file.
///
/// # Errors
/// The file cannot be written, or the vocabulary has no form as a list of merges.
pub fn save(path: &Path, vocabulary: &Vocabulary, post_processor: Option<&Value>) -> Result<()> {
    AtomicFile::write(path, contents(vocabulary, post_processor)?.as_bytes())
}

fn complaint(message: impl Into<String>) -> TokenizerError {
    TokenizerError::Vocabulary(message.into())
}

/// Enough to tell which model a file holds before its tables are read.
#[derive(Deserialize)]
struct Outline {
    model: ModelKind,
}

#[derive(Deserialize)]
struct ModelKind {
    #[serde(rename = "type")]
    kind: Option<String>,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedEntry>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    model: Model,
}

#[derive(Deserialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "the fields are those of the file"
)]
struct AddedEntry {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    vocab: HashMap<String, u32>,
    merges: Vec<MergeEntry>,
}

/// New files have pairs, old ones a line with a space.
#[derive(Deserialize)]
#[serde(untagged)]
enum MergeEntry {
    Pair(String, String),
    Line(String),
}

impl MergeEntry {
    fn parts(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair(left, right) => Some((left, right)),
            Self::Line(line) => line
                .split_once(' ')
                .filter(|(_, right)| !right.contains(' ')),
        }
    }
}

/// Read the contents of a file.
///
/// # Errors
/// As [`load`], but without a path in the message.
pub fn parse(contents: &[u8]) -> Result<TokenizerJson> {
    let no_json =
        |error: serde_json::Error| complaint(format!("not a tokenizer.json, or damaged: {error}"));
    let outline: Outline = serde_json::from_slice(contents).map_err(no_json)?;
    if let Some(kind) = outline.model.kind.filter(|kind| kind != "BPE") {
        return Err(complaint(format!(
            "its model is {kind}: only byte-level BPE is supported"
        )));
    }
    let file: File = serde_json::from_slice(contents).map_err(no_json)?;
    check_model(&file.model)?;
    if let Some(normalizer) = &file.normalizer {
        return Err(complaint(format!(
            "it changes text before cutting it (normalizer {}): only tokenizers without a normalizer are supported",
            kind_of(normalizer)
        )));
    }
    let pattern = pattern_of(file.pre_tokenizer.as_ref())?;
    if let Some(decoder) = &file.decoder
        && kind_of(decoder) != "ByteLevel"
    {
        return Err(complaint(format!(
            "its decoder is {}: only ByteLevel is supported",
            kind_of(decoder)
        )));
    }
    let added = added_tokens(&file)?;
    let (tokens, rule) = tables(&file.model, &added)?;
    let vocabulary = Vocabulary::new(Parts {
        pattern,
        rule,
        tokens,
        added,
    })?;
    Ok(TokenizerJson {
        vocabulary,
        post_processor: file.post_processor,
    })
}

fn check_model(model: &Model) -> Result<()> {
    let is_set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    let unsupported = [
        ("dropout", model.dropout.is_some_and(|p| p > 0.0)),
        (
            "continuing_subword_prefix",
            is_set(&model.continuing_subword_prefix),
        ),
        ("end_of_word_suffix", is_set(&model.end_of_word_suffix)),
        ("byte_fallback", model.byte_fallback),
    ];
    match unsupported.iter().find(|(_, set)| *set) {
        Some((name, _)) => Err(complaint(format!(
            "its model sets {name}: only plain byte-level BPE is supported"
        ))),
        None => Ok(()),
    }
}

fn added_tokens(file: &File) -> Result<Vec<AddedToken>> {
    let mut added = Vec::new();
    for entry in &file.added_tokens {
        let flags = [
            ("single_word", entry.single_word),
            ("lstrip", entry.lstrip),
            ("rstrip", entry.rstrip),
        ];
        if let Some((flag, _)) = flags.iter().find(|(_, set)| *set) {
            return Err(complaint(format!(
                "its added token {:?} sets {flag}, which is not supported",
                entry.content
            )));
        }
        if let Some(&id) = file
            .model
            .vocab
            .get(&entry.content)
            .filter(|&&id| id != entry.id)
        {
            return Err(complaint(format!(
                "added token {:?} has id {} but the vocabulary says {id}: the file is damaged",
                entry.content, entry.id
            )));
        }
        added.push(AddedToken {
            content: entry.content.clone(),
            id: entry.id,
            special: entry.special,
        });
    }
    Ok(added)
}

/// Tokens by id, and the merges as ids.
fn tables(model: &Model, added: &[AddedToken]) -> Result<(BTreeMap<u32, Vec<u8>>, MergeRule)> {
    let alphabet = Alphabet::new();
    let mut tokens = BTreeMap::new();
    for (content, &id) in &model.vocab {
        if added
            .iter()
            .any(|token| token.id == id && token.content == *content)
        {
            continue;
        }
        let bytes = alphabet.decode(content).ok_or_else(|| {
            complaint(format!("token {content:?} (id {id}) is not in the byte-level alphabet: only byte-level BPE is supported"))
        })?;
        if tokens.insert(id, bytes).is_some() {
            return Err(complaint(format!(
                "two tokens have id {id}: the file is damaged"
            )));
        }
    }
    let mut merges = Vec::with_capacity(model.merges.len());
    for (rank, entry) in model.merges.iter().enumerate() {
        let (left, right) = entry.parts().ok_or_else(|| {
            complaint(format!(
                "merge {rank} is not two tokens: the file is damaged"
            ))
        })?;
        let id = |part: &str| {
            model
                .vocab
                .get(part)
                .copied()
                .ok_or_else(|| complaint(format!("merge {rank} uses {part:?}, which is not in the vocabulary: the file is damaged")))
        };
        merges.push((id(left)?, id(right)?));
    }
    let rule = MergeRule::Listed {
        merges,
        ignore_merges: model.ignore_merges,
    };
    Ok((tokens, rule))
}

fn kind_of(part: &Value) -> &str {
    part.get("type")
        .and_then(Value::as_str)
        .unwrap_or("without a type")
}

/// Which pattern a pre-tokenizer amounts to.
fn pattern_of(pre_tokenizer: Option<&Value>) -> Result<Pattern> {
    let Some(part) = pre_tokenizer else {
        return Err(complaint(
            "it has no pre_tokenizer: only byte-level BPE is supported",
        ));
    };
    let single = [part.clone()];
    let parts = match (
        kind_of(part),
        part.get("pretokenizers").and_then(Value::as_array),
    ) {
        ("Sequence", Some(parts)) => parts.as_slice(),
        _ => single.as_slice(),
    };
    let flag = |part: &Value, name: &str, default: bool| {
        part.get(name).and_then(Value::as_bool).unwrap_or(default)
    };
    let [first @ .., last] = parts else {
        return Err(complaint("its pre_tokenizer is an empty sequence"));
    };
    if kind_of(last) != "ByteLevel" {
        return Err(complaint(format!(
            "its pre_tokenizer ends in {}: only byte-level BPE is supported",
            kind_of(last)
        )));
    }
    if flag(last, "add_prefix_space", true) {
        return Err(complaint(
            "its pre_tokenizer sets add_prefix_space, which is not supported",
        ));
    }
    match (first, flag(last, "use_regex", true)) {
        ([], true) => return Ok(Pattern::Gpt2),
        ([digits], true)
            if kind_of(digits) == "Digits" && flag(digits, "individual_digits", false) =>
        {
            return Ok(Pattern::Smollm);
        }
        ([split], false) if kind_of(split) == "Split" && keeps_all_matches(split) => {
            let regex = split
                .pointer("/pattern/Regex")
                .and_then(Value::as_str)
                .unwrap_or_default();
            if let Some(pattern) = Pattern::from_regex(regex) {
                return Ok(pattern);
            }
            return Err(complaint(format!(
                "its pattern is not one that ingot knows: {regex}"
            )));
        }
        _ => {}
    }
    let kinds: Vec<&str> = parts.iter().map(kind_of).collect();
    Err(complaint(format!(
        "its pre_tokenizer ({}) is not one that ingot knows",
        kinds.join(", ")
    )))
}

/// The known patterns match every character, so that each match is a piece in both of these forms.
fn keeps_all_matches(split: &Value) -> bool {
    let behavior = split.get("behavior").and_then(Value::as_str);
    let invert = split.get("invert").and_then(Value::as_bool);
    matches!(
        (behavior, invert),
        (Some("Isolated"), _) | (Some("Removed"), Some(true))
    )
}

/// The pre-tokenizer that cuts as the pattern does.
fn pre_tokenizer(pattern: Pattern) -> Value {
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    match pattern {
        Pattern::Gpt2 => byte_level(true),
        Pattern::Smollm => json!({
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level(true)],
        }),
        Pattern::Cl100k | Pattern::Llama3 | Pattern::Qwen2 => {
            let split = json!({"type": "Split", "pattern": {"Regex": pattern.regex()}, "behavior": "Isolated", "invert": false});
            json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
        }
    }
}

#[derive(Serialize)]
struct FileOut<'a> {
    version: &'a str,
    truncation: Option<()>,
    padding: Option<()>,
    added_tokens: Vec<Value>,
    normalizer: Option<()>,
    pre_tokenizer: Value,
    post_processor: Option<&'a Value>,
    decoder: Value,
    model: ModelOut<'a>,
}

#[derive(Serialize)]
struct ModelOut<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    dropout: Option<f64>,
    unk_token: Option<&'a str>,
    continuing_subword_prefix: Option<&'a str>,
    end_of_word_suffix: Option<&'a str>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: VocabOut,
    merges: Vec<(&'a str, &'a str)>,
}

/// A map in order of ids.
struct VocabOut(Vec<(String, u32)>);

impl Serialize for VocabOut {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, id) in &self.0 {
            map.serialize_entry(token, id)?;
        }
        map.end()
    }
}

/// The contents of a file.
///
/// # Errors
/// A vocabulary without a list of merges: ranks of which some token is not made by one merge of two others.
pub fn contents(vocabulary: &Vocabulary, post_processor: Option<&Value>) -> Result<String> {
    let MergeRule::Listed {
        merges,
        ignore_merges,
    } = vocabulary.rule()
    else {
        return Err(complaint(
            "this vocabulary cannot be a tokenizer.json: some of its tokens are not made by one merge of two others, which only \
             tiktoken's rule allows; write it with save_tiktoken",
        ));
    };
    let alphabet = Alphabet::new();
    let mut names = vec![String::new(); vocabulary.len()];
    for (id, token) in vocabulary.ordinary() {
        names[id as usize] = alphabet.encode(token);
    }
    let mut vocab: Vec<(String, u32)> = vocabulary
        .ordinary()
        .map(|(id, _)| (names[id as usize].clone(), id))
        .collect();
    vocab.extend(
        vocabulary
            .added()
            .iter()
            .map(|token| (token.content.clone(), token.id)),
    );
    vocab.sort_by_key(|&(_, id)| id);
    let added_tokens = vocabulary.added().iter().map(|token| {
        json!({
            "id": token.id, "content": token.content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": !token.special, "special": token.special,
        })
    });
    let file = FileOut {
        version: "1.0",
        truncation: None,
        padding: None,
        added_tokens: added_tokens.collect(),
        normalizer: None,
        pre_tokenizer: pre_tokenizer(vocabulary.pattern()),
        post_processor,
        decoder: json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
        model: ModelOut {
            kind: "BPE",
            dropout: None,
            unk_token: None,
            continuing_subword_prefix: None,
            end_of_word_suffix: None,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: *ignore_merges,
            vocab: VocabOut(vocab),
            merges: merges
                .iter()
                .map(|&(l, r)| (names[l as usize].as_str(), names[r as usize].as_str()))
                .collect(),
        },
    };
    serde_json::to_string_pretty(&file)
        .map_err(|error| complaint(format!("cannot be written as JSON: {error}")))
}
