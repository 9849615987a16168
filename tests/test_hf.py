"""Hugging Face directories in both directions, against transformers; and every way in which one can be wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import ingot
from ingot.errors import CheckpointError, ConfigError
from ingot.models import hf
from ingot.models.base import Model
from networks import SHAPES, native, perturbed

VOCAB_SIZE = 53
LENGTH = 40
TOLERANCE = 1e-4

GPT2: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_positions": 64,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_SCALING: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TRANSFORMERS_CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt2 free head, relu": lambda: transformers.GPT2Config(
        **GPT2, tie_word_embeddings=False, n_inner=50, activation_function="relu"
    ),
    "gpt2 exact gelu": lambda: transformers.GPT2Config(**GPT2, activation_function="gelu", layer_norm_epsilon=1e-3),
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "llama tied, biases": lambda: transformers.LlamaConfig(
        **LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama3 scaling": lambda: transformers.LlamaConfig(
        **LLAMA, rope_parameters={**LLAMA3_SCALING, "rope_theta": 500.0}
    ),
    "linear scaling": lambda: transformers.LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
    ),
    "llama wide heads": lambda: transformers.LlamaConfig(**LLAMA, head_dim=10, rms_norm_eps=1e-3),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=10, tie_word_embeddings=True),
    "qwen3 biases": lambda: transformers.Qwen3Config(**LLAMA, head_dim=6, attention_bias=True),
}
OWN_CONFIGS: dict[str, ingot.ModelConfig] = {
    **{name: SHAPES[name] for name in ("gpt2", "gelu", "qwen2", "qwen3")},
    # transformers' Llama wants heads that divide the width.
    "llama": ingot.ModelConfig.llama(
        **{**LLAMA, "head_dim": 10, "attention_bias": "qkvo", "mlp_bias": True, "rope_scaling": LLAMA3_SCALING}
    ),
    "llama free": ingot.ModelConfig.llama(**LLAMA, tie_word_embeddings=False, rope_theta=300.0, norm_eps=1e-3),
}


def from_transformers(name: str, seed: int = 0) -> Any:
    """One of transformers' models, with noise on every weight."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(TRANSFORMERS_CONFIGS[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def their_logits(model: Any, tokens: Any) -> Any:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()[None]).logits[0].float().numpy()


def our_logits(model: Model, tokens: Any) -> Any:
    """[T, V]: the final hidden state times the head's matrix."""
    names = ("lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight")
    head = next(model.parameters[name] for name in names if name in model.parameters)
    offsets = np.array([0, len(tokens)])
    _, out = model.forward(tokens, offsets, np.full_like(tokens, -1), want=("hidden",), train=False)
    return out.hidden @ head.T


def assert_same_network(ours: Model, theirs: Any) -> None:
    """The same logits, and log-probabilities that belong to them."""
    tokens = np.random.default_rng(1).integers(0, ours.config.vocab_size, LENGTH, dtype=np.int32)
    targets = np.random.default_rng(2).integers(0, ours.config.vocab_size, LENGTH, dtype=np.int32)
    expected = their_logits(theirs, tokens)
    assert expected.std() > 0.2
    np.testing.assert_allclose(our_logits(ours, tokens), expected, atol=TOLERANCE)
    _, out = ours.forward(tokens, np.array([0, LENGTH]), targets, train=False)
    logprobs = torch.log_softmax(torch.from_numpy(expected), -1).numpy()[np.arange(LENGTH), targets]
    np.testing.assert_allclose(out.logprobs, logprobs, atol=TOLERANCE)


# ---- from transformers


@pytest.mark.parametrize("name", TRANSFORMERS_CONFIGS)
def test_directories_of_transformers_open(name: str, tmp_path: Path) -> None:
    theirs = from_transformers(name)
    theirs.save_pretrained(tmp_path)
    assert_same_network(ingot.load_model(tmp_path), theirs)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_shards_open(name: str, tmp_path: Path) -> None:
    theirs = from_transformers(name)
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_network(ingot.load_model(tmp_path), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_other_float_types_open(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = from_transformers(name).to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = ingot.load_model(tmp_path)
    # The stored numbers exactly, computed with in f32.
    for key, tensor in theirs.state_dict().items():
        if key in ours.parameters:
            np.testing.assert_array_equal(ours.parameters[key], tensor.float().numpy())
    assert_same_network(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())


def test_older_names_of_the_rotary_settings_open(tmp_path: Path) -> None:
    from_transformers("llama3 scaling").save_pretrained(tmp_path)
    new = hf.read_config(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["rope_parameters"]
    fields |= {"rope_theta": 500.0, "rope_scaling": dict(LLAMA3_SCALING)}
    assert hf.config_from_hf(fields, "config.json") == new
    fields["rope_scaling"]["type"] = fields["rope_scaling"].pop("rope_type")
    assert hf.config_from_hf(fields, "config.json") == new
    fields["rope_scaling"] = None
    assert hf.config_from_hf(fields, "config.json").rope_scaling is None


def test_old_gpt2_files_open(tmp_path: Path) -> None:
    """Without the prefix, with the causal masks, and with the head beside the embedding that it shares."""
    theirs = from_transformers("gpt2")
    theirs.save_pretrained(tmp_path)
    weights = {
        name.removeprefix("transformer."): array for name, array in load_file(tmp_path / "model.safetensors").items()
    }
    weights |= {f"h.{i}.attn.bias": np.ones((1, 1, 64, 64), np.float32) for i in range(2)}
    weights |= {f"h.{i}.attn.masked_bias": np.float32([-1e4]) for i in range(2)}
    weights["lm_head.weight"] = weights["wte.weight"].copy()
    save_file(weights, tmp_path / "model.safetensors")
    assert_same_network(ingot.load_model(tmp_path), theirs)
    del weights["wte.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    assert_same_network(ingot.load_model(tmp_path), theirs)
    weights["wte.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from wte\.weight: set tie_word_embeddings"):
        ingot.load_model(tmp_path)


# ---- to transformers


@pytest.mark.parametrize("name", OWN_CONFIGS)
def test_our_directories_open_in_transformers(name: str, tmp_path: Path) -> None:
    config = OWN_CONFIGS[name]
    ours = native(config, perturbed(config))
    ours.save(tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    assert theirs.config.eos_token_id is None
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, LENGTH, dtype=np.int32)
    expected = their_logits(theirs.eval(), tokens)
    # Weights that are far from their initial values make logits of more than unit size.
    np.testing.assert_allclose(our_logits(ours, tokens), expected, atol=TOLERANCE * max(1.0, expected.std()))


@pytest.mark.parametrize("name", SHAPES)
def test_what_was_saved_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = SHAPES[name]
    ours = native(config, perturbed(config, 2), 2)
    ours.save(tmp_path)
    again = ingot.load_model(tmp_path)
    assert (again.config, again.num_values) == (config, 2)
    for key, array in ours.state().items():
        np.testing.assert_array_equal(array, again.parameters[key])


def test_files_are_as_the_ecosystem_expects(tmp_path: Path) -> None:
    config = SHAPES["gpt2"]
    native(config, perturbed(config)).save(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == {"format": "pt", "ingot_version": ingot.__version__}
    assert "lm_head.weight" not in header
    width = config.hidden_size
    assert header["transformer.h.0.attn.c_attn.weight"]["shape"] == [width, 3 * width]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    first = raw
    native(config, perturbed(config)).save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == first


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SHAPES["llama"]
    ours = native(config, perturbed(config))
    ours.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    ours.parameters["model.norm.weight"][...] = 7.0
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        ours.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", [*TRANSFORMERS_CONFIGS])
def test_configurations_survive_the_round_trip(name: str) -> None:
    config = hf.config_from_hf(TRANSFORMERS_CONFIGS[name]().to_dict(), "config.json")
    assert hf.config_from_hf(hf.config_to_hf(config), "config.json") == config


# ---- scalar heads


def test_scalar_heads_are_kept_or_made(tmp_path: Path) -> None:
    config = SHAPES["llama"]
    native(config, perturbed(config)).save(tmp_path)
    assert ingot.load_model(tmp_path).num_values == 0
    critic = ingot.load_model(tmp_path, seed=3, num_values=1)
    fresh = ingot.Model(config, seed=3, num_values=1)
    np.testing.assert_array_equal(critic.parameters["score.weight"], fresh.parameters["score.weight"])
    assert critic.parameters["score.weight"].any()
    critic.save(tmp_path)
    assert ingot.load_model(tmp_path).num_values == 1
    with pytest.raises(ConfigError, match="has 1 scalar heads, not 2: leave num_values out"):
        ingot.load_model(tmp_path, num_values=2)


# ---- what is wrong is named


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = SHAPES["llama"]
    native(config, perturbed(config)).save(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def reconfigure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


NORM = "model.norm.weight"
WIDTH = SHAPES["llama"].hidden_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NORM), f"missing: {NORM}. Save the model again"),
        (lambda w: w.update({"model.extra.weight": w[NORM]}), "surplus: model.extra.weight."),
        (lambda w: w.update({NORM: w[NORM][:-1]}), f"wrong shape: {NORM} is [{WIDTH - 1}], not [{WIDTH}]"),
        (lambda w: w.update({"norm.weight": w[NORM]}), f"{NORM} and norm.weight are the same weight"),
        (lambda w: w.update({NORM: w[NORM].astype(np.int32)}), f"{NORM} is stored as I32; float types alone"),
        (lambda w: [w.pop(name) for name in list(w)[:6]], " and 2 more. Save the model again"),
    ],
)
def test_wrong_weights_are_named(saved: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        ingot.load_model(saved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; ingot opens gpt2, llama, qwen2, qwen3, ingot"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; ingot's networks have 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rotary scaling 'yarn' is not known"),
        ({"rope_scaling": {"rope_type": "linear"}}, "the key 'factor' is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; ingot turns whole heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 does not divide by num_key_value_heads 3"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2}, "layer_types has 'sliding_attention'"),
        ({"model_type": "gpt2"}, "the key 'n_embd' is missing"),
        ({"model_type": "ingot"}, "unknown key 'hidden_act': written by a newer version"),
        ({"hidden_size": 8, "head_dim": 2}, "wrong shape: "),
        ({"num_hidden_layers": 3}, "missing: model.layers.2.input_layernorm.weight, "),
    ],
)
def test_wrong_configurations_are_named(saved: Path, fields: dict[str, Any], message: str) -> None:
    reconfigure(saved, **fields)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        ingot.load_model(saved)
    assert str(saved) in str(caught.value)


def test_damaged_files_are_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for broken, message in (
        (whole[:5], "cut short"),
        (whole[: 8 + length // 2], "cut short"),
        (whole[:-1], "cut short"),
        (b"\xff" * 8 + whole[8:], "cut short"),
        (whole[:8] + b"x" * length + whole[8 + length :], "the safetensors header is damaged"),
        (
            whole[:8] + whole[8 : 8 + length].replace(b'"F32"', b'"F16"', 1) + whole[8 + length :],
            "does not fill its place",
        ),
        (whole[:8] + b"[]".ljust(length) + whole[8 + length :], "the safetensors header is damaged"),
    ):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: .*{message}"):
            ingot.load_model(saved)
    path.write_bytes(whole)
    (saved / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        ingot.load_model(saved)


def test_missing_files_are_named(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        ingot.load_model(saved / "nowhere")
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, which ingot does not read"):
        ingot.load_model(saved)
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: "model-00001-of-00001.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors is missing, which .* names"):
        ingot.load_model(saved)
    index.write_text(json.dumps({"weight_map": {NORM: "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="is missing, which"):
        ingot.load_model(saved)
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        ingot.load_model(saved)
