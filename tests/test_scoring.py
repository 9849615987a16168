"""Scores by a reward model: the right token, transformers' numbers, folders in both forms, and what does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import ingot
from ingot.cli import main
from ingot.configs import ModelConfig
from ingot.data.chat import ChatEncoder, ChatTemplate
from ingot.errors import CheckpointError, ConfigError, DataError
from ingot.inference.scoring import RewardModel
from ingot.models import Model
from ingot.tokenizer import END_OF_TEXT, Tokenizer
from ingot.training.companions import write_tokenizer_config
from ingot.training.rewards import RewardFunctions, load_reward

CONTEXT = 96
PROMPT: Any = [{"role": "user", "content": "say a word"}]


def new_encoder() -> ChatEncoder:
    template = ChatTemplate.built_in()
    tokenizer = Tokenizer.bytes_only().with_special_tokens([END_OF_TEXT])
    return ChatEncoder(template, tokenizer.with_special_tokens(template.missing_special_tokens(tokenizer)))


def new_model(family: str = "llama", criteria: tuple[str, ...] = ("helpful", "harmless"), **shape: Any) -> RewardModel:
    make = ModelConfig.llama if family == "llama" else ModelConfig.gpt2
    encoder = new_encoder()
    fields = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    config = make(**{"vocab_size": encoder.tokenizer.vocab_size, "initializer_range": 0.3, **fields, **shape})
    model = Model(config, seed=1, num_values=len(criteria), threads=1)
    model.parameters["score.bias"][...] = np.arange(len(criteria)) + 0.5
    gain, bias = 2.0 + np.arange(len(criteria)), -1.0 * np.arange(len(criteria))
    return RewardModel(model, encoder, criteria, gain=gain, bias=bias)


def write(model: RewardModel, folder: Path) -> Path:
    folder.mkdir()
    model.save(folder)
    model.encoder.tokenizer.save(folder)
    write_tokenizer_config(folder, model.encoder.tokenizer, encoder=model.encoder)
    return folder


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"attention_bias": "qkv"}),
        ("llama", {"qk_norm": True}),
        ("gpt2", {}),
    ],
)
def test_transformers_opens_it_and_gives_the_same_scores(tmp_path, family, shape):
    ours = new_model(family, **shape)
    folder = write(ours, tmp_path / "rm")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = theirs.double().eval()
    assert theirs.config.id2label == {0: "helpful", 1: "harmless"}
    words = ["yes", "no, I would rather not", "?"]
    tokens = [ours.encoder.encode([*PROMPT, {"role": "assistant", "content": word}]).ids for word in words]
    longest = max(map(len, tokens))
    padded = np.full((len(words), longest), ours.encoder.pad_token_id)
    for row, ids in enumerate(tokens):
        padded[row, : len(ids)] = ids
    mask = torch.tensor(np.arange(longest) < np.array([[len(ids)] for ids in tokens]))
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor(padded), attention_mask=mask).logits.numpy()
    expected = logits + np.array(theirs.config.score_bias)
    got = ours.score_each([PROMPT] * 3, words)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    again = RewardModel.load(folder, threads=1)
    assert again.criteria == ("helpful", "harmless")
    np.testing.assert_allclose(again.score_each([PROMPT] * 3, words), expected, atol=2e-5)
    assert np.ptp(expected, axis=0).min() > 0.1


def test_a_model_of_transformers_is_read(tmp_path):
    encoder = new_encoder()
    config = transformers.LlamaConfig(
        vocab_size=encoder.tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=1,
        pad_token_id=encoder.pad_token_id,
    )
    theirs = transformers.LlamaForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    encoder.tokenizer.save(tmp_path)
    write_tokenizer_config(tmp_path, encoder.tokenizer, encoder=encoder)
    ours = RewardModel.load(tmp_path, threads=1)
    ids = encoder.encode([*PROMPT, {"role": "assistant", "content": "hello"}]).ids
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids[None], dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(ours.score_each([PROMPT], ["hello"]), expected, atol=1e-5)
    assert ours.criteria == ("LABEL_0",)


def test_the_score_is_that_of_the_end_however_the_batch_is_packed():
    model = new_model()
    words = [f"word {number}" * (number % 4) for number in range(9)]
    whole = model.score_each([PROMPT] * len(words), words)
    for number, word in enumerate(words):
        ids = model.encoder.encode([*PROMPT, {"role": "assistant", "content": word}]).ids
        assert ids[-1] == model.encoder.end_of_turn_id
        offsets = np.array([0, len(ids)])
        _, out = model.model.forward(ids, offsets, np.full(len(ids), -1, np.int32), want=("values",), train=False)
        np.testing.assert_array_equal(model.gain * out.values[-1].astype(np.float64) + model.bias, whole[number])
        np.testing.assert_array_equal(model.score_tokens_each(ids, offsets)[0], whole[number])
        # Without its end, as a response that was cut off: the end is put behind it.
        np.testing.assert_array_equal(model.score_tokens_each(ids[:-1], np.array([0, len(ids) - 1]))[0], whole[number])
    np.testing.assert_array_equal(model.score([PROMPT] * len(words), words), whole.mean(axis=1))


def test_plain_text_ends_as_it_was_trained():
    model = new_model()
    ids = model.encoder.encode_text(" world", "hello").ids
    offsets = np.array([0, len(ids)])
    expected = model.score(["hello"], [" world"])
    assert model.score_tokens(ids, offsets) == expected
    cut = (ids[:-1], np.array([0, len(ids) - 1]))
    assert model.score_tokens(*cut, end_id=model.encoder.text_end_id) == expected
    assert model.score_tokens(*cut) != expected


def test_a_response_that_fills_the_context_ends_in_its_last_place():
    model = new_model(max_position_embeddings=20)
    ids = np.arange(20, dtype=np.int32) + 40
    ended = np.append(ids[:-1], np.int32(model.encoder.end_of_turn_id))
    offsets = np.array([0, 20])
    assert model.score_tokens(ids, offsets) == model.score_tokens(ended, offsets)
    with pytest.raises(DataError, match="sequence 1 has 21 tokens; a score needs 1 to 20"):
        model.score_tokens(np.append(ids, np.append(ids, 7)).astype(np.int32), np.array([0, 20, 41]))
    with pytest.raises(DataError, match="sequence 0 has 0 tokens"):
        model.score_tokens(ids[:0], np.array([0, 0]))
    with pytest.raises(
        DataError, match=r"response 1 cannot be scored: it has \d+ tokens with its prompt.* context is 20: shorten"
    ):
        model.score(["a", "b" * 30], ["c", "d"])


def test_criteria_are_weighed(tmp_path):
    model = new_model()
    folder = write(model, tmp_path / "rm")
    each = RewardModel.load(folder).score_each([PROMPT], ["yes"])[0]
    assert RewardModel.load(f"{folder}:harmless").score([PROMPT], ["yes"])[0] == each[1]
    weighed = RewardModel.load(folder, weights={"helpful": 2.0, "harmless": -1.0})
    assert weighed.score([PROMPT], ["yes"])[0] == pytest.approx(2 * each[0] - each[1])
    with pytest.raises(ConfigError, match="rm: scores helpful, harmless, not 'honest'"):
        RewardModel.load(folder, weights={"honest": 1.0})
    with pytest.raises(ConfigError, match="the weight of helpful is nan"):
        RewardModel.load(folder, weights={"helpful": float("nan")})
    functions = RewardFunctions([str(folder), f"{folder}:harmless"], [1.0, 0.5], place={"threads": 1})
    rewards = functions([PROMPT], [[{"role": "assistant", "content": "yes"}]])
    assert rewards.names == ("rm", "rm:harmless")
    np.testing.assert_allclose(rewards.total, each.mean() + 0.5 * each[1])


def test_what_is_no_reward_model_is_refused(tmp_path):
    model = new_model()
    model.model.save(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match=r"checkpoint: holds a network in training.*give the folder of its run"):
        load_reward(str(tmp_path / "checkpoint"))
    Model(model.model.config).save(tmp_path / "policy")
    with pytest.raises(ConfigError, match=r"policy: holds a model that writes, not one that scores.*ingot reward"):
        load_reward(str(tmp_path / "policy"))
    with pytest.raises(
        ConfigError, match=r"missing: no such folder; give the folder of a reward model, or \./file\.py:FUNCTION"
    ):
        load_reward(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="holds no model; give the folder of a reward model"):
        load_reward(str(tmp_path))


def test_another_tokenizer_or_template_is_refused():
    model = new_model()
    model.require_tokens_of(new_encoder(), "runs/sft")
    model.require_tokens_of(new_encoder().tokenizer, "runs/sft")
    larger = new_encoder().tokenizer.with_special_tokens(["<|more|>"])
    with pytest.raises(ConfigError, match=r"its tokenizer \(260 tokens\) is not that of runs/sft \(261 tokens\)"):
        model.require_tokens_of(larger, "runs/sft")
    template = dataclasses.replace(model.encoder.template, source=model.encoder.template.source + "\n")
    with pytest.raises(ConfigError, match="its chat template is not that of runs/sft"):
        model.require_tokens_of(ChatEncoder(template, model.encoder.tokenizer), "runs/sft")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_bias": [1.0]}, "score_bias in config.json is .* not one finite number for each of 2 heads"),
        ({"score_bias": "x"}, "score_bias"),
        ({"id2label": {"0": "a"}}, "names 1 labels, but score.weight has 2 rows"),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path, changes, message):
    folder = write(new_model(), tmp_path / "rm")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        RewardModel.load(folder)


def test_the_native_and_the_torch_backend_agree(tmp_path):
    folder = write(new_model(), tmp_path / "rm")
    words = ["yes", "no", ""]
    native = RewardModel.load(folder, threads=1).score([PROMPT] * 3, words)
    torch_scores = ingot.RewardModel.load(folder, backend="torch", device="cpu").score([PROMPT] * 3, words)
    np.testing.assert_allclose(native, torch_scores, atol=1e-5)


@pytest.mark.parametrize("command", ["chat", "generate", "eval", "pretrain"])
def test_a_reward_model_writes_nothing(tmp_path, capsys, command):
    folder = write(new_model(), tmp_path / "rm")
    (tmp_path / "text.txt").write_text("words " * 500)
    model = ["--model", str(folder)] if command == "pretrain" else [str(folder)]
    data = ["--data", str(tmp_path / "text.txt")] if command in ("eval", "pretrain") else []
    output = ["--output", str(tmp_path / "run"), "--max-length", "32"] if command == "pretrain" else []
    assert main([command, *model, *data, *output]) == 2
    assert "rm: is a reward model, which scores and writes nothing: give a model that writes" in capsys.readouterr().err
