"""Answers in steps: where steps end, in text and in sampled ids, and what a process reward model makes of them."""

from __future__ import annotations

import decimal
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import ingot
from ingot.cli import main
from ingot.configs import ModelConfig
from ingot.data.chat import ChatEncoder, ChatTemplate
from ingot.data.examples import encode_row
from ingot.data.rows import parse_row
from ingot.data.steps import encode_steps, split_steps, with_step_ends
from ingot.errors import CheckpointError, ConfigError, DataError
from ingot.inference.scoring import RewardModel
from ingot.losses.reward import aggregate_steps
from ingot.models import Model
from ingot.models.base import LongArray
from ingot.tokenizer import END_OF_TEXT, Tokenizer
from ingot.training.companions import write_tokenizer_config

QUESTION: Any = [{"role": "user", "content": "2+2+2?\nnow"}]


def encoder_of(tokenizer: Tokenizer) -> ChatEncoder:
    template = ChatTemplate.built_in()
    tokenizer = tokenizer.with_special_tokens([END_OF_TEXT])
    return ChatEncoder(template, tokenizer.with_special_tokens(template.missing_special_tokens(tokenizer)))


BYTES = encoder_of(Tokenizer.bytes_only())


@pytest.fixture(scope="module")
def judge() -> RewardModel:
    config = ModelConfig.llama(
        vocab_size=BYTES.tokenizer.vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, max_position_embeddings=64,
    )  # fmt: skip
    return RewardModel(Model(config, seed=1, num_values=1, threads=1), BYTES, step_separator="\n")


def saved(judge: RewardModel, folder: Path) -> Path:
    folder.mkdir()
    judge.save(folder)
    judge.encoder.tokenizer.save(folder)
    write_tokenizer_config(folder, judge.encoder.tokenizer, encoder=judge.encoder)
    return folder


# ---- where steps end


@pytest.mark.parametrize(
    ("text", "separator", "steps"),
    [
        ("a\nb", "\n", ["a", "b"]),
        ("a\nb\n", "\n", ["a", "b"]),
        ("a\n\nb\n \n", "\n", ["a", "\nb"]),
        ("\na", "\n", ["\na"]),
        ("", "\n", [""]),
        (" \n", "\n", [""]),
        ("a\nb ки\n\nc ки", " ки\n", ["a\nb", "\nc ки"]),
    ],
)
def test_an_answer_has_these_steps(text, separator, steps):
    assert split_steps(text, separator) == steps


LINES = st.text("ab \n", max_size=12)


@settings(max_examples=150, deadline=None)
@given(text=LINES, separator=st.sampled_from(["\n", "\n\n", "b"]))
def test_text_and_its_ids_have_the_same_steps(text, separator):
    """Bytes are cut in one way, so that what was sampled must give exactly what the text gives."""
    whole = encode_steps("q\n", split_steps(text, separator), BYTES, separator)
    first = len(BYTES.encode_text_prompt("q\n"))
    sampled = np.array([*BYTES.encode_text_prompt("q\n"), *text.encode()], np.int32)
    found = with_step_ends(sampled, first, BYTES.tokenizer, separator)
    if any(part.strip() for part in text.split(separator)):
        assert found.ids.tolist() == whole.ids.tolist()
        assert found.ends == whole.ends
    else:
        # Nothing was said: the separators that there are stay.
        assert found.ends == (len(found) - 1,)


def test_a_token_that_holds_the_end_of_a_separator_ends_the_step():
    tokenizer = Tokenizer.train(iter(["a.\n\nb.\n\n" * 50]), vocab_size=258, pattern="cl100k")
    encoder = encoder_of(tokenizer)
    for text in ("a.\n\nb", "a.\n\nb.\n\n", "a.\nb."):
        ids = np.array(encoder.tokenizer.encode_ordinary(text), np.int32)
        found = with_step_ends(ids, 0, encoder.tokenizer)
        assert found.ends[-1] == len(found) - 1
        ended = [encoder.tokenizer.decode(found.ids[: end + 1]) for end in found.ends]
        assert len(ended) == 2
        assert ended[0].rstrip("\n") == "a."
        assert all(each.endswith("\n") for each in ended)


def test_a_full_context_keeps_its_steps():
    ids = np.frombuffer(b"q?a\nbb\ncccc", np.uint8).astype(np.int32)
    found = with_step_ends(ids, 2, BYTES.tokenizer, max_length=len(ids))
    assert BYTES.tokenizer.decode(found.ids) == "q?a\nbb\nccc\n"
    assert found.ends == (3, 6, 10)


@pytest.mark.parametrize("prompt", ["2+2+2?\n", QUESTION])
def test_a_row_of_steps_is_judged_at_the_separators(prompt):
    row = {"prompt": prompt, "completions": ["2+2=4", "4+2=7"], "labels": [True, False]}
    [found] = encode_row(parse_row(row), BYTES, step_separator=";\n")
    asked = BYTES.encode_prompt(prompt) if isinstance(prompt, list) else BYTES.encode_text_prompt(prompt)
    assert found.ids[: len(asked)].tolist() == asked.tolist()
    assert not found.mask[: len(asked)].any()
    assert BYTES.tokenizer.decode(found.ids[found.mask]) == "2+2=4;\n4+2=7;\n"
    ended = [BYTES.tokenizer.decode(found.ids[len(asked) : end + 1]) for end in found.ends]
    assert ended == ["2+2=4;\n", "2+2=4;\n4+2=7;\n"]


# ---- scores


def log_odds_of_all(rewards: np.ndarray) -> float:
    """In decimals with digits enough for what cancels."""
    with decimal.localcontext() as context:
        context.prec = 700
        against = decimal.Decimal(1)
        for reward in rewards.tolist():
            against *= 1 + (-decimal.Decimal(reward)).exp()
        return -float((against - 1).ln())


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 1.0, 30.0, 200.0]),
)
def test_steps_are_put_together_by_formulas(sizes, seed, scale):
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    rewards = np.random.default_rng(seed).normal(scale=scale, size=(int(offsets[-1]), 2))
    groups = [rewards[low:high] for low, high in itertools.pairwise(offsets)]
    np.testing.assert_array_equal(aggregate_steps(rewards, offsets), [each[-1] for each in groups])
    np.testing.assert_array_equal(aggregate_steps(rewards, offsets, "min"), [each.min(0) for each in groups])
    found = aggregate_steps(rewards, offsets, "product")
    for got, each in zip(found, groups, strict=True):
        for head in range(2):
            assert got[head] == pytest.approx(log_odds_of_all(each[:, head]), rel=1e-12)
    one = np.arange(len(rewards) + 1)
    np.testing.assert_array_equal(aggregate_steps(rewards, one, "product"), rewards)
    with pytest.raises(ValueError, match="has no step"):
        aggregate_steps(rewards, np.array([0, 0, len(rewards)]))
    with pytest.raises(ConfigError, match="last, min, product, not 'mean'"):
        aggregate_steps(rewards, offsets, "mean")  # type: ignore[arg-type]


def test_each_step_is_scored_as_if_nothing_followed(judge):
    steps = ["2+2=4", "so 6", "#### 6"]
    [scores] = judge.score_steps([QUESTION], [steps])
    shorter = [judge.score([QUESTION], ["\n".join(steps[:number])])[0] for number in (1, 2, 3)]
    np.testing.assert_array_equal(scores, shorter)
    text = "\n".join(steps)
    for completion in (text, text + "\n", [{"role": "assistant", "content": text}]):
        np.testing.assert_array_equal(judge.score_steps([QUESTION], [completion])[0], scores)
    plain = judge.score_steps(["2+2+2?\n"] * 2, [text, "x"])
    assert [len(each) for each in plain] == [3, 1]
    assert judge(["2+2+2?\n"], [text]) == [plain[0][-1]]


def test_a_folder_says_how_its_steps_are_put_together(judge, tmp_path):
    folder = saved(judge, tmp_path / "prm")
    [scores] = judge.score_steps([QUESTION], ["a\nb\nc"])
    for name, expected in (
        ("", scores[-1]),
        (":last", scores[-1]),
        (":min", scores.min()),
        (":product", aggregate_steps(scores, np.array([0, 3]), "product")[0]),
    ):
        loaded = RewardModel.load(f"{folder}{name}", threads=1)
        assert loaded.name == f"prm{name}"
        assert loaded.score([QUESTION], ["a\nb\nc"])[0] == pytest.approx(expected, abs=1e-6)
    assert RewardModel.load(folder, step_aggregate="min").step_aggregate == "min"
    with pytest.raises(ConfigError, match="scores reward, not 'mean'"):
        RewardModel.load(f"{folder}:mean")


def test_transformers_reads_the_last_step_where_it_reads_a_score(judge, tmp_path):
    folder = saved(judge, tmp_path / "prm")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.config.step_separator == "\n"
    ids = encode_steps(QUESTION, ["a", "b"], BYTES).ids
    with torch.no_grad():
        logit = theirs(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0, 0].item()
    assert judge.score([QUESTION], ["a\nb"])[0] == pytest.approx(logit, abs=1e-4)


def packed(texts: list[str], ended: list[bool]) -> tuple[np.ndarray, LongArray, LongArray]:
    asked = BYTES.encode_prompt(QUESTION)
    sequences = [
        np.array([*asked, *text.encode(), *([BYTES.end_of_turn_id] if end else [])], np.int32)
        for text, end in zip(texts, ended, strict=True)
    ]
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in sequences])]).astype(np.int64)
    return np.concatenate(sequences), offsets, np.full(len(texts), len(asked), np.int64)


@pytest.mark.parametrize("how", ["last", "min", "product"])
def test_sampled_tokens_score_as_their_text(judge, how, tmp_path):
    loaded = RewardModel.load(saved(judge, tmp_path / "prm"), step_aggregate=how, threads=1)
    texts = ["a\nb", "a\nb\n", "c", "a\nlonger"]
    tokens, offsets, prompts = packed(texts, [True, True, False, False])
    found = loaded.score_tokens(tokens, offsets, prompt_lengths=prompts)
    np.testing.assert_array_equal(found, loaded.score([QUESTION] * 4, texts))
    if how == "last":
        np.testing.assert_array_equal(loaded.score_tokens(tokens, offsets), found)
    else:
        with pytest.raises(ValueError, match="give prompt_lengths"):
            loaded.score_tokens(tokens, offsets)


def test_what_cannot_be_scored_is_said(judge, tmp_path):
    with pytest.raises(DataError, match="response 1 cannot be scored: it has no step"):
        judge.score_steps([QUESTION] * 2, ["a", []])
    with pytest.raises(DataError, match="the completion is a list of messages, but the prompt is text"):
        judge.score_steps(["a"], [[{"role": "assistant", "content": "b"}]])
    with pytest.raises(DataError, match="the model's context is 64: shorten it"):
        judge.score_steps([QUESTION], ["a" * 70])
    whole = RewardModel(judge.model, BYTES)
    with pytest.raises(ConfigError, match="scores whole responses, not steps"):
        whole.score_steps([QUESTION], ["a"])
    folder = saved(judge, tmp_path / "prm")
    fields = json.loads((folder / "config.json").read_bytes())
    for wrong in (3, ""):
        (folder / "config.json").write_text(json.dumps({**fields, "step_separator": wrong}))
        with pytest.raises(CheckpointError, match=r"step_separator in config\.json is .*, not a text"):
            RewardModel.load(folder)


# ---- what is looked at before


def test_data_show_marks_what_is_judged(tmp_path, capsys):
    BYTES.tokenizer.save(tmp_path)
    write_tokenizer_config(tmp_path, BYTES.tokenizer, encoder=BYTES)
    row = {"prompt": QUESTION, "completions": ["4", "7"], "labels": [True, False]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    show = ["data", "show", str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path)]
    assert main(show) == 0
    printed = capsys.readouterr().out
    assert "4|\u23ce <right>\n7|\u23ce <wrong>\n" in printed
    assert "2 judged" in printed
    assert "[[4" not in printed
    assert main([*show, "--json", "--step-separator", ";"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [facts["tokens"][end] for end in facts["ends"]] == [";", ";"]
    assert facts["labels"] == [True, False]
    assert not any(facts["trained"])
    assert main(["data", "check", str(tmp_path / "a.jsonl")]) == 0
    # The prompt of 10 characters and both steps.
    assert "longest 12" in capsys.readouterr().out
    assert ingot.RewardModel is RewardModel
