"""Fine-tuning on demonstrations: what is learned and what is not, what a run leaves behind, and what it says to bad input."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingot
from ingot.cli import main
from ingot.configs import ModelConfig, SFTConfig
from ingot.data.chat import ChatEncoder, ChatTemplate, Encoded
from ingot.data.examples import assemble_pack
from ingot.errors import ConfigError, DataError, RunError
from ingot.inference.generate import generate
from ingot.models import Model, load_model
from ingot.models.growth import grow_vocabulary
from ingot.tokenizer import END_OF_TEXT, Tokenizer
from ingot.training import sft as phase
from ingot.training.callbacks import Callback
from killable_sft import child, rows, settings, write_base, write_rows

CONFIG = SFTConfig(max_steps=4, sample_tokens=0, learning_rate=1e-2)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a base model and demonstrations."""
    write_base(tmp_path / "base")
    write_rows(tmp_path / "a.jsonl", rows())
    return tmp_path


def config_at(place: Path, **changes: Any) -> SFTConfig:
    return dataclasses.replace(
        CONFIG,
        **{"model": str(place / "base"), "data": (str(place / "a.jsonl"),), "output": str(place / "run"), **changes},
    )


# ---- the gradient


def sequence(ids: list[int], trained: int) -> Encoded:
    """The last ``trained`` of these ids are the answer."""
    mask = np.arange(len(ids)) >= len(ids) - trained
    return Encoded(np.array(ids, np.int32), mask, (len(ids) - 1,))


def small_model(**shape: Any) -> Any:
    fields = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **shape}
    return Model(ModelConfig.llama(**fields), seed=1)


def gradient(model: Any, config: SFTConfig, *packs: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    model.zero_grad()
    metrics = phase._backward(model, config, packs, 0)
    return metrics, {name: np.array(value) for name, value in model.gradients.items()}


@pytest.mark.parametrize("prompt_targets", [False, True])
def test_prompts_alone_have_no_gradient_at_all(prompt_targets):
    pack = assemble_pack([[sequence([5, 6, 7, 8], 0)], [sequence([9, 4], 0)]], prompt_targets=prompt_targets)
    metrics, grads = gradient(small_model(), CONFIG, pack)
    assert metrics["loss"] == 0.0
    assert all((grad == 0.0).all() for grad in grads.values())
    weighted = dataclasses.replace(CONFIG, prompt_weight=0.1)
    if prompt_targets:
        assert any((grad != 0.0).any() for grad in gradient(small_model(), weighted, pack)[1].values())


def test_the_loss_is_the_cross_entropy_of_the_answers_computed_apart():
    model = small_model()
    sequences = [sequence([5, 6, 7, 8, 9], 2), sequence([1, 2, 3], 1), sequence([4, 4, 5, 6, 7, 8], 3)]
    each = []
    for one in sequences:
        ids, first = one.ids, int(np.argmax(one.mask))
        targets = np.append(ids[1:], np.int32(-1)).astype(np.int32)
        _, out = model.forward(ids, np.array([0, len(ids)], np.int64), targets, train=False)
        each.append(-out.logprobs[first - 1 : -1].astype(np.float64))
    expected = {
        "token_mean": np.concatenate(each).mean(),
        "sequence_mean": np.mean([values.mean() for values in each]),
        "sum": np.concatenate(each).sum(),
    }
    one = assemble_pack([[one] for one in sequences])
    two = [assemble_pack([[sequences[2]]]), assemble_pack([[one] for one in sequences[:2]])]
    for reduction, value in expected.items():
        config = dataclasses.replace(CONFIG, loss_reduction=reduction)
        whole, grads = gradient(model, config, one)
        assert whole["loss"] == pytest.approx(value, rel=1e-6)
        divided, same = gradient(model, config, *two)
        assert divided["loss"] == pytest.approx(value, rel=1e-6)
        for name, grad in grads.items():
            np.testing.assert_allclose(same[name], grad, atol=2e-6, err_msg=name)


def test_every_weighting_is_the_gradient_of_its_loss():
    """Along the gradient, a finite difference of the loss has the gradient's squared length; DFT holds its weights fixed."""
    pack = assemble_pack([[sequence([5, 6, 7, 8, 9], 2)], [sequence([1, 2, 3], 1)]], prompt_targets=True)
    cases = ({"label_smoothing_factor": 0.7}, {"z_loss": 0.5}, {"prompt_weight": 0.3, "loss_reduction": "sum"})
    for changes in cases:
        model, config = small_model(initializer_range=0.3), dataclasses.replace(CONFIG, **changes)
        _, grads = gradient(model, config, pack)
        length = sum(float((grad.astype(np.float64) ** 2).sum()) for grad in grads.values())
        before, losses = model.state(), []
        for sign in (1, -1):
            model.load_state({name: before[name] + sign * 1e-3 / length**0.5 * grads[name] for name in before})
            losses.append(gradient(model, config, pack)[0]["loss"])
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(length**0.5, rel=1e-2), changes
    plain, dft = small_model(), dataclasses.replace(CONFIG, loss_type="dft")
    certain = gradient(plain, dft, pack)[0]
    assert certain["loss"] < certain["nll_loss"]


# ---- growing


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_new_tokens_leave_the_old_logits_as_they_were(tied, family):
    make = ModelConfig.llama if family == "llama" else ModelConfig.gpt2
    shape = make(vocab_size=37, hidden_size=20, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=tied)
    old, new = Model(shape, seed=2), Model(dataclasses.replace(shape, vocab_size=40), seed=9)
    state = grow_vocabulary(old.state(), num_known=37, num_ids=40, seed=5)
    new.load_state(state)
    tokens, offsets = np.arange(12, dtype=np.int32) * 3, np.array([0, 5, 12], np.int64)
    targets = np.where(np.arange(12) % 5 == 4, -1, (tokens * 7 + 1) % 37).astype(np.int32)
    ask: dict[str, Any] = {"want": ("logprobs", "lse", "hidden"), "hidden_rows": np.arange(12), "train": False}
    _, before = old.forward(tokens, offsets, targets, **ask)
    _, after = new.forward(tokens, offsets, targets, banned_ids=[37, 38, 39], **ask)
    np.testing.assert_array_equal(before.hidden, after.hidden)
    np.testing.assert_array_equal(before.logprobs, after.logprobs)
    np.testing.assert_array_equal(before.lse, after.lse)
    table = state["lm_head.weight" if not tied else next(iter(state))]
    mean = table[:37].mean(axis=0)
    assert 0 < np.abs(table[37:] - mean).max() < 0.6 * table[:37].std()
    assert (table[37] != table[38]).any()
    again = grow_vocabulary(old.state(), num_known=37, num_ids=40, seed=6)
    assert any((again[name] != state[name]).any() for name in state)


def test_ids_of_a_padded_vocabulary_are_used_before_it_grows():
    state = {"model.embed_tokens.weight": np.arange(24, dtype=np.float32).reshape(8, 3)}
    grown = grow_vocabulary(state, num_known=5, num_ids=7, seed=0)["model.embed_tokens.weight"]
    assert grown.shape == (8, 3)
    np.testing.assert_array_equal(grown[[0, 1, 2, 3, 4, 7]], state["model.embed_tokens.weight"][[0, 1, 2, 3, 4, 7]])
    assert np.abs(grown[5:7] - [6, 7, 8]).max() < 2.5


# ---- runs


def test_it_learns_a_task_and_leaves_a_complete_folder(place, capsys):
    write_base(place / "base", hidden_size=32)
    config = config_at(place, max_steps=240, eval_steps=120, sample_tokens=8, held_out=0.2, sample_temperature=0.0)
    result = ingot.sft(config)
    out = capsys.readouterr().out
    assert re.search(r"^step 240  held-out loss \d\.\d+  token accuracy \d+\.\d %  answers ended 100 %$", out, re.M)
    lines = [line for line in result.history if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 120, 240]
    assert lines[-1]["eval_loss"] < 0.3 * lines[0]["eval_loss"]
    assert lines[-1]["eval_mean_token_accuracy"] > 0.9
    assert lines[-1]["eval_eos_rate"] == 1.0
    logged = [line for line in result.history if "loss" in line]
    assert all({"mean_token_accuracy", "entropy", "nll_loss", "grad_norm"} <= line.keys() for line in logged)
    samples = [json.loads(line) for line in (result.output / "samples.jsonl").read_text().splitlines()]
    asked = {one["prompt"] for one in samples}
    assert len(asked) == min(8, json.loads((result.output / "run.json").read_bytes())["data"]["num_held_out"])
    assert len(samples) == 3 * len(asked)
    assert all(one["ended"] for one in samples[-len(asked) :])

    model, tokenizer = load_model(result.output), Tokenizer.from_file(result.output)
    encoder = ChatEncoder(ChatTemplate.of_model(result.output), tokenizer)
    prompt = encoder.encode_prompt([{"role": "user", "content": "61: g"}])
    (answer,) = generate(model, tokenizer, [prompt.tolist()], temperature=0.0, end_ids=encoder.end_ids)
    assert answer.finish_reason == "end_of_text"
    assert answer.text == "g"
    assert "ingot sft" in (result.output / "README.md").read_text()
    assert SFTConfig.from_dict(json.loads((result.output / "run.json").read_bytes())["config"]) == config
    with pytest.raises(RunError, match=r"holds a finished run of 240 steps.*ingot sft --resume"):
        ingot.sft(config)


def test_transformers_opens_the_run_with_the_same_template(place):
    import transformers

    result = ingot.sft(config_at(place, max_steps=1), quiet=True)
    for folder in (result.output, result.output / "checkpoint-1"):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = ChatEncoder(ChatTemplate.of_model(folder), Tokenizer.from_file(folder))
        messages: list[Any] = rows(1)[0]["messages"]  # type: ignore[assignment]
        text = theirs.apply_chat_template(messages, tokenize=False)
        assert text == ours.template.render(messages)
        whole = ours.encode(messages).ids.tolist()
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        # The template writes a new line after the last end of turn, which is not learned.
        assert ids[: len(whole)] == whole
        assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|pad|>")
        assert theirs.eos_token_id == ours.end_of_turn_id != theirs.pad_token_id


def test_figures_of_each_file_and_rows_that_are_too_long(place, capsys):
    long = {"prompt": "q" * 90, "completion": "a" * 30}
    write_rows(place / "b.jsonl", [{"prompt": f"{n}?", "completion": "yes"} for n in range(40)] + [long])
    data = (str(place / "a.jsonl"), str(place / "b.jsonl"))
    result = ingot.sft(config_at(place, data=data, max_steps=2, eval_steps=2))
    assert f"{place / 'b.jsonl'}: 1 of 41 rows are longer than 96 tokens and left out whole" in capsys.readouterr().out
    last = result.history[-1]
    tokens = {}
    for name in ("a", "b"):
        assert last[f"eval_{name}_loss"] > 0
        assert 0 <= last[f"eval_{name}_mean_token_accuracy"] <= 1
        tokens[name] = last[f"eval_{name}_loss"]
    assert min(tokens.values()) < last["eval_loss"] < max(tokens.values())
    facts = json.loads((result.output / "run.json").read_bytes())["data"]
    assert (facts["num_rows"], facts["num_too_long"]) == (101, 1)
    assert facts["num_train"] + facts["num_held_out"] == 100


def test_a_template_of_ones_own_travels_with_the_run(place):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    (place / "own.jinja").write_text(template)
    result = ingot.sft(config_at(place, max_steps=2, chat_template=str(place / "own.jinja")), quiet=True)
    assert {"<|user|>", "<|assistant|>"} <= set(result.tokenizer.special_tokens)
    encoder = ChatEncoder(ChatTemplate.of_model(result.output), Tokenizer.from_file(result.output))
    assert encoder.template.source == template
    assert encoder.end_of_turn == END_OF_TEXT
    # A second run from the first adds nothing and keeps the template.
    again = ingot.sft(config_at(place, model=str(result.output), output=str(place / "again"), max_steps=2), quiet=True)
    assert again.tokenizer == result.tokenizer
    assert again.model.config == result.model.config


def test_rows_from_a_program_and_a_callback(place):
    class Steps(Callback):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_evaluate(self, run: Any, metrics: Any) -> None:
            self.seen.append(run.step)

    watch = Steps()
    config = config_at(place, data=(), eval_steps=2, num_train_epochs=1, max_steps=None, held_out=0.2)
    result = ingot.sft(config, data=rows(30), callbacks=[watch], quiet=True)
    assert watch.seen[0] == 0
    assert watch.seen[-1] == -(-json.loads((result.output / "run.json").read_bytes())["data"]["num_train"] // 16)
    with pytest.raises(RunError, match=r"the rows given: changed since this run began"):
        ingot.resume(result.output, max_steps=9, data=rows(31), quiet=True)
    assert ingot.resume(result.output, max_steps=9, data=rows(30), quiet=True).history[-1]["step"] == 9


# ---- killed and resumed


def snapshot(folder: Path) -> dict[str, Any]:
    names = ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "samples.jsonl"]
    names += ["config.json", "README.md", "checkpoint-10/model.safetensors", "checkpoint-10/optimizer.safetensors"]
    taken: dict[str, Any] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken["metrics"] = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    taken["folder"] = sorted(entry.name for entry in folder.iterdir() if entry.name != "run.lock")
    return taken


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are of Unix")
def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path):
    write_base(tmp_path / "base")
    write_rows(tmp_path / "a.jsonl", rows(40))
    write_rows(tmp_path / "b.jsonl", [{"prompt": f"{n}?", "completion": "yes"} for n in range(20)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_sft"])

    def run(folder: Path, kill_at: int | None = None, log: Path | None = None) -> int | None:
        process = context.Process(target=child, args=(folder, kill_at, log))
        process.start()
        process.join(600)
        return process.exitcode

    (tmp_path / "whole").mkdir()
    assert run(tmp_path / "whole" / "run", log=tmp_path / "points") == 0
    expected = snapshot(tmp_path / "whole" / "run")
    points = (tmp_path / "points").read_text().split("\n")
    # In the first seconds, where the tokenizer is saved, between checkpoints, and near the end.
    first_save = next(n for n, name in enumerate(points) if name.startswith("optimizer"))
    tokenizer = next(n for n, name in enumerate(points) if name.startswith("tokenizer.json"))
    (tmp_path / "killed").mkdir()
    folder = tmp_path / "killed" / "run"
    for kill_at in (tokenizer, first_save + 12, 30):
        assert run(folder, kill_at) == -9, "the run was over before it was killed"
    assert run(folder) == 0
    assert settings(folder).dropout > 0
    assert snapshot(folder) == expected


# ---- the command line


def test_from_pretraining_to_an_answer_on_the_command_line(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(f"{n % 10} and {(n + 1) % 10}, " for n in range(800)))
    data = write_rows(tmp_path / "demos.jsonl", rows())
    shape = ["--model.hidden-size", "16", "--model.num-hidden-layers", "1", "--model.num-attention-heads", "2"]
    base, run = str(tmp_path / "base"), str(tmp_path / "sft")
    text = ["--data", str(tmp_path / "text.txt"), "--output", base, "--max-length", "64", "--sample-tokens", "0"]
    assert main(["pretrain", *text, *shape, "--max-steps", "2"]) == 0
    arguments = ["sft", "--model", base, "--data", data, "--output", run, "--sample-tokens", "2"]
    assert main([*arguments, "--dry-run"]) == 0
    assert not Path(run).exists()
    capsys.readouterr()
    assert main([*arguments, "--max-steps", "3", "--json"]) == 0
    printed = capsys.readouterr().out
    facts = json.loads(printed)
    assert (facts["steps"], facts["output"]) == (3, run)
    assert load_model(run).config.vocab_size == 256 + 4
    assert main(["sft", "--resume", run, "--max-steps", "5"]) == 0
    assert f"resumed from {run}/checkpoint-3" in capsys.readouterr().out
    again = ["sft", "--config", f"{run}/sft.toml", "--output", run + "2", "--num-train-epochs", "1"]
    assert main(again) == 0
    assert main(["pretrain", "--resume", run]) == 1
    assert f"a run of ingot sft; go on with it: ingot sft --resume {run}" in capsys.readouterr().err


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        ([{"prompt": "a"}] * 9, {}, r"a\.jsonl, row 1: is prompt-only: it holds no answer; give rows with answers"),
        ([{"prompt": "a", "completion": "b", "label": False}], {}, r"a\.jsonl, row 1: is of kind unpaired preference"),
        ([{"messages": MESSAGES[:1]}], {}, r'a\.jsonl, row 1: field "messages" has no assistant message'),
        ([{"prompt": "a", "completion": "b" * 200}], {}, r"a\.jsonl: none of 1 rows fits into max_length 96"),
        ([{"messages": MESSAGES}] * 9, {}, r"9 rows with 1 different prompts are too few to hold 10 %"),
        (None, {"model": "nowhere"}, r"nowhere: no such folder"),
        (None, {"model": ""}, r"no model to start from: give --model"),
        (None, {"data": ()}, r"no demonstrations to learn from: give --data"),
        (None, {"pack_length": 50}, r"pack_length 50 is below max_length 96"),
    ],
)
def test_bad_input_is_one_clear_line(place, entries, changes, message):
    if entries is not None:
        write_rows(place / "a.jsonl", entries)
    with pytest.raises((ConfigError, DataError, RunError, ingot.CheckpointError), match=message) as caught:
        ingot.sft(config_at(place, **changes), quiet=True)
    assert "\n" not in str(caught.value)


def test_settings_that_cannot_be_are_refused():
    for changes, message in (
        ({"loss_type": "dft", "z_loss": 0.1}, "loss_type dft has neither"),
        ({"max_length": 9, "pack_length": 8}, "pack_length 8 is below max_length 9"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor must be"),
        ({"max_steps": 3, "num_train_epochs": 1}, "give one of them"),
    ):
        with pytest.raises(ConfigError, match=message):
            SFTConfig(**changes)


def test_a_model_that_scores_or_has_too_few_positions_is_refused(place):
    config = ModelConfig.gpt2(
        vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32
    )
    Model(config).save(place / "base")
    with pytest.raises(ConfigError, match="max_length 64 is beyond the 32 positions"):
        ingot.sft(config_at(place, max_length=64), quiet=True)
    Model(config, num_values=1).save(place / "base")
    with pytest.raises(ConfigError, match="is a model that scores"):
        ingot.sft(config_at(place, output=str(place / "other")), quiet=True)
