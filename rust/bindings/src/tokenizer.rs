//! The tokenizer as Python sees it. Text crosses without a copy, ids leave as numpy arrays that take over the memory.

#![allow(
    clippy::needless_pass_by_value,
    reason = "PyO3 hands arguments over by value"
)]

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Mutex;

use ingot_tokenizer::{
    FileKind, Pattern, PieceCounter, SpecialPolicy, Specials, Tick, Tokenizer, TokenizerError,
    TrainOptions, Vocabulary, train,
};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyInt, PyList, PyString};

use crate::enter::{enter, lock};

/// `str` or `bytes`, kept alive while its memory is read.
#[derive(FromPyObject)]
pub enum Text<'py> {
    /// Read as UTF-8; a lone surrogate raises `UnicodeEncodeError`.
    #[pyo3(annotation = "str")]
    Str(Bound<'py, PyString>),
    /// Read as it is.
    #[pyo3(annotation = "bytes")]
    Bytes(Bound<'py, PyBytes>),
}

impl Text<'_> {
    fn as_bytes(&self) -> PyResult<&[u8]> {
        match self {
            Self::Str(text) => Ok(text.to_str()?.as_bytes()),
            Self::Bytes(bytes) => Ok(bytes.as_bytes()),
        }
    }
}

/// [`enter`] for work that takes long: it gets a tick through which Python handles Ctrl-C now and then.
fn run<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&mut Tick<'_>) -> Result<T, TokenizerError> + Send,
) -> PyResult<T> {
    let mut raised = None;
    let result = enter(py, || {
        work(&mut || keep(Python::attach(signals), &mut raised))
    });
    raised.map_or(result, Err)
}

/// Let Python handle Ctrl-C.
fn signals(py: Python<'_>) -> PyResult<()> {
    py.check_signals()
}

/// Go on, unless Python raised something: keep that and stop.
fn keep(answer: PyResult<()>, raised: &mut Option<PyErr>) -> ControlFlow<()> {
    match answer {
        Ok(()) => ControlFlow::Continue(()),
        Err(error) => {
            *raised = Some(error);
            ControlFlow::Break(())
        }
    }
}

/// Threads to use: all that affinity and the container allow, unless a number is given.
fn thread_count(threads: Option<usize>) -> PyResult<usize> {
    match threads {
        Some(0) => Err(PyValueError::new_err(
            "threads is 0: give at least 1, or None for all that this process may use",
        )),
        Some(threads) => Ok(threads),
        None => Ok(std::thread::available_parallelism().map_or(1, usize::from)),
    }
}

/// `None` means all special tokens.
fn specials(names: Option<Vec<String>>) -> Specials {
    names.map_or(Specials::All, Specials::These)
}

/// Ids of several texts one after the other, and the offsets of the texts.
type BatchArrays<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<i64>>);

/// See `ingot.Tokenizer`.
#[pyclass(frozen, module = "ingot._native", name = "Tokenizer")]
pub struct NativeTokenizer {
    inner: Tokenizer,
    /// Every special token is ordinary text.
    ordinary: SpecialPolicy,
    /// Every special token is refused.
    strict: SpecialPolicy,
    /// A Python int for each id, made when the first long list is: sharing them takes a fifth of the memory of a list of new ones.
    ints: PyOnceLock<Vec<Py<PyInt>>>,
}

/// Lists from this length on share their ints.
const SHARE_FROM: usize = 1024;

impl NativeTokenizer {
    fn new(inner: Tokenizer) -> Self {
        let none = || Specials::These(Vec::new());
        Self {
            ordinary: inner.special_policy(&none(), &none()),
            strict: inner.special_policy(&none(), &Specials::All),
            ints: PyOnceLock::new(),
            inner,
        }
    }

    /// Ids as a list of ints.
    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        if ids.len() < SHARE_FROM && self.ints.get(py).is_none() {
            return PyList::new(py, ids);
        }
        let ints = self.ints.get_or_try_init(py, || {
            let all = 0..self.inner.vocabulary().len();
            all.map(|id| Ok(id.into_pyobject(py)?.unbind()))
                .collect::<PyResult<_>>()
        })?;
        PyList::new(py, ids.iter().map(|&id| &ints[id as usize]))
    }

    /// Run with the policy for these settings, prepared beforehand for the two common ones.
    fn with_policy<T>(
        &self,
        allowed: Option<Vec<String>>,
        disallowed: Option<Vec<String>>,
        work: impl FnOnce(&SpecialPolicy) -> T,
    ) -> T {
        match (allowed, disallowed) {
            (Some(allowed), None) if allowed.is_empty() => work(&self.strict),
            (Some(allowed), Some(disallowed)) if allowed.is_empty() && disallowed.is_empty() => {
                work(&self.ordinary)
            }
            (allowed, disallowed) => work(
                &self
                    .inner
                    .special_policy(&specials(allowed), &specials(disallowed)),
            ),
        }
    }

    fn ids(
        &self,
        py: Python<'_>,
        text: &Text<'_>,
        allowed: Option<Vec<String>>,
        disallowed: Option<Vec<String>>,
    ) -> PyResult<Vec<u32>> {
        let text = text.as_bytes()?;
        self.with_policy(allowed, disallowed, |policy| {
            run(py, |tick| self.inner.encode(text, policy, tick))
        })
    }

    fn batch(
        &self,
        py: Python<'_>,
        texts: &[Text<'_>],
        allowed: Option<Vec<String>>,
        disallowed: Option<Vec<String>>,
        threads: usize,
    ) -> PyResult<(Vec<u32>, Vec<i64>)> {
        let texts = texts
            .iter()
            .map(Text::as_bytes)
            .collect::<PyResult<Vec<_>>>()?;
        self.with_policy(allowed, disallowed, |policy| {
            run(py, |tick| {
                self.inner.encode_batch(&texts, policy, threads, tick)
            })
        })
    }
}

#[pymethods]
impl NativeTokenizer {
    #[staticmethod]
    fn from_file(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        run(py, |_| Tokenizer::from_file(&path)).map(Self::new)
    }

    #[staticmethod]
    fn from_tiktoken(
        py: Python<'_>,
        path: PathBuf,
        pattern: &str,
        special_tokens: Vec<(String, u32)>,
    ) -> PyResult<Self> {
        run(py, |_| {
            Tokenizer::from_tiktoken(&path, Pattern::parse(pattern)?, &special_tokens)
        })
        .map(Self::new)
    }

    /// From what `contents` gave, and for a rank file the pattern and the special tokens.
    #[staticmethod]
    fn from_contents(
        py: Python<'_>,
        kind: &str,
        contents: &[u8],
        pattern: &str,
        special_tokens: Vec<(String, u32)>,
    ) -> PyResult<Self> {
        let made = run(py, |_| match kind {
            "tiktoken" => {
                Tokenizer::from_ranks(contents, Pattern::parse(pattern)?, &special_tokens)
            }
            _ => Tokenizer::from_json(contents),
        });
        made.map(Self::new)
    }

    #[staticmethod]
    fn bytes_only(py: Python<'_>, pattern: &str) -> PyResult<Self> {
        run(py, |_| {
            Ok(Tokenizer::new(Vocabulary::bytes_only(Pattern::parse(
                pattern,
            )?)))
        })
        .map(Self::new)
    }

    fn contents<'py>(&self, py: Python<'py>) -> PyResult<(&'static str, Bound<'py, PyBytes>)> {
        let (kind, contents) = run(py, |_| self.inner.contents())?;
        let kind = match kind {
            FileKind::TokenizerJson => "tokenizer.json",
            FileKind::Tiktoken => "tiktoken",
        };
        Ok((kind, PyBytes::new(py, &contents)))
    }

    fn canonical_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.inner.vocabulary().canonical_bytes())
    }

    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<PathBuf> {
        run(py, |_| self.inner.save(&path))
    }

    fn save_tiktoken(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        run(py, |_| self.inner.save_tiktoken(&path))
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.inner.vocabulary().len()
    }

    #[getter]
    fn pattern(&self) -> &'static str {
        self.inner.vocabulary().pattern().name()
    }

    /// (string, id), ascending by id.
    #[getter]
    fn special_tokens(&self) -> Vec<(String, u32)> {
        let tokens = self.inner.special_tokens();
        tokens
            .map(|token| (token.content.clone(), token.id))
            .collect()
    }

    #[pyo3(signature = (text, allowed, disallowed))]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        text: Text<'py>,
        allowed: Option<Vec<String>>,
        disallowed: Option<Vec<String>>,
    ) -> PyResult<Bound<'py, PyList>> {
        self.list(py, &self.ids(py, &text, allowed, disallowed)?)
    }

    #[pyo3(signature = (text, allowed, disallowed))]
    fn encode_to_numpy<'py>(
        &self,
        py: Python<'py>,
        text: Text<'py>,
        allowed: Option<Vec<String>>,
        disallowed: Option<Vec<String>>,
    ) -> PyResult<Bound<'py, PyArray1<u32>>> {
        Ok(self.ids(py, &text, allowed, disallowed)?.into_pyarray(py))
    }

    #[pyo3(signature = (texts, allowed, disallowed, threads))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Text<'py>>,
        allowed: Option<Vec<String>>,
        disallowed: Option<Vec<String>>,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyList>> {
        let (ids, offsets) = self.batch(py, &texts, allowed, disallowed, thread_count(threads)?)?;
        let lists = offsets
            .windows(2)
            .map(|ends| self.list(py, &ids[ends[0] as usize..ends[1] as usize]));
        PyList::new(py, lists.collect::<PyResult<Vec<_>>>()?)
    }

    #[pyo3(signature = (texts, allowed, disallowed, threads))]
    fn encode_batch_to_numpy<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Text<'py>>,
        allowed: Option<Vec<String>>,
        disallowed: Option<Vec<String>>,
        threads: Option<usize>,
    ) -> PyResult<BatchArrays<'py>> {
        let (ids, offsets) = self.batch(py, &texts, allowed, disallowed, thread_count(threads)?)?;
        Ok((ids.into_pyarray(py), offsets.into_pyarray(py)))
    }

    #[pyo3(signature = (path, output, threads))]
    fn encode_file(
        &self,
        py: Python<'_>,
        path: PathBuf,
        output: PathBuf,
        threads: Option<usize>,
    ) -> PyResult<u64> {
        let threads = thread_count(threads)?;
        run(py, |tick| {
            self.inner.encode_file(&path, &output, threads, tick)
        })
    }

    fn decode_list<'py>(&self, py: Python<'py>, ids: Vec<i64>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = run(py, |_| self.inner.decode(ids))?;
        Ok(PyBytes::new(py, &bytes))
    }

    fn decode_array<'py>(
        &self,
        py: Python<'py>,
        ids: PyReadonlyArray1<'py, i64>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let ids = ids.as_slice()?;
        let bytes = run(py, |_| self.inner.decode(ids.iter().copied()))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// The pieces that text is cut into before merging, as byte offsets where each starts, and the end: [pieces + 1].
    fn piece_offsets<'py>(
        &self,
        py: Python<'py>,
        text: Text<'py>,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let text = text.as_bytes()?;
        let offsets = run(py, |_| {
            let mut offsets = vec![0];
            let pattern = self.inner.vocabulary().pattern();
            pattern.for_each_piece(text, |_, end| offsets.push(end as i64));
            Ok(offsets)
        })?;
        Ok(offsets.into_pyarray(py))
    }
}

/// Counts pieces of text, then learns a vocabulary from the counts.
#[pyclass(frozen, module = "ingot._native", name = "TokenizerTrainer")]
pub struct NativeTrainer {
    counter: Mutex<Option<PieceCounter>>,
}

/// What a trainer is called in errors.
const TRAINER: &str = "tokenizer trainer";

fn used_up() -> PyErr {
    PyRuntimeError::new_err("this tokenizer trainer has learned its vocabulary: make a new one")
}

impl NativeTrainer {
    fn count(
        &self,
        py: Python<'_>,
        add: impl FnOnce(&mut PieceCounter, &mut Tick<'_>) -> Result<(), TokenizerError> + Send,
    ) -> PyResult<u64> {
        let mut counter = lock(&self.counter, TRAINER).map_err(|error| error.into_python(py))?;
        let counter = counter.as_mut().ok_or_else(used_up)?;
        run(py, |tick| add(counter, tick))?;
        Ok(counter.num_bytes())
    }
}

#[pymethods]
impl NativeTrainer {
    #[new]
    #[pyo3(signature = (pattern, threads))]
    fn new(py: Python<'_>, pattern: &str, threads: Option<usize>) -> PyResult<Self> {
        let pattern = run(py, |_| Pattern::parse(pattern))?;
        Ok(Self {
            counter: Mutex::new(Some(PieceCounter::new(pattern, thread_count(threads)?))),
        })
    }

    /// Count documents; bytes counted so far.
    fn add_documents(&self, py: Python<'_>, documents: Vec<Text<'_>>) -> PyResult<u64> {
        let documents = documents
            .iter()
            .map(Text::as_bytes)
            .collect::<PyResult<Vec<_>>>()?;
        self.count(py, |counter, tick| counter.add_documents(&documents, tick))
    }

    /// Count a file, which is one document; bytes counted so far.
    fn add_file(&self, py: Python<'_>, path: PathBuf) -> PyResult<u64> {
        self.count(py, |counter, tick| counter.add_file(&path, tick))
    }

    /// Learn. `progress(merges, wanted)` is called now and then; what it raises ends the training.
    #[pyo3(signature = (vocab_size, special_tokens, min_frequency, progress))]
    fn train(
        &self,
        py: Python<'_>,
        vocab_size: usize,
        special_tokens: Vec<String>,
        min_frequency: u64,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<NativeTokenizer> {
        let counter = lock(&self.counter, TRAINER)
            .map_err(|error| error.into_python(py))?
            .take();
        let counter = counter.ok_or_else(used_up)?;
        let options = TrainOptions {
            vocab_size,
            special_tokens,
            min_frequency,
        };
        let mut raised = None;
        let result = enter(py, || {
            train(counter, &options, &mut |done, wanted| {
                let answer = Python::attach(|py| {
                    signals(py)?;
                    progress
                        .as_ref()
                        .map_or(Ok(()), |call| call.call1(py, (done, wanted)).map(drop))
                });
                keep(answer, &mut raised)
            })
        });
        let vocabulary = raised.map_or(result, Err)?;
        Ok(NativeTokenizer::new(Tokenizer::new(vocabulary)))
    }
}
