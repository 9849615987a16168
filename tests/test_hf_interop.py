"""Directories that transformers opens, and directories that transformers saved."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import ingot
from ingot.errors import CheckpointError
from ingot.models import base
from ingot.models.hf import family_of
from networks import SHAPES, native, perturbed

LENGTH = 40
CLASSES = {
    "gpt2": transformers.GPT2LMHeadModel,
    "gelu": transformers.GPT2LMHeadModel,
    "llama": transformers.LlamaForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
}


def our_logits(model: base.Model, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[T, V], as logprobs + lse of each id in turn: the seam never shows the whole row."""
    vocab_size, count = model.config.vocab_size, len(tokens)
    repeated = np.tile(tokens, vocab_size)
    offsets = np.arange(0, vocab_size * count + 1, count)
    targets = np.repeat(np.arange(vocab_size), count).astype(np.int32)
    _, out = model.forward(repeated, offsets, targets, want=("logprobs", "lse"), train=False)
    return (out.logprobs + out.lse).reshape(vocab_size, count).T


def their_logits(model: Any, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    model.eval()
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    return logits


def sample(vocab_size: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, vocab_size, LENGTH).astype(np.int32)


@pytest.mark.parametrize("shape", CLASSES)
def test_transformers_opens_what_is_saved(shape: str, tmp_path: Path) -> None:
    config = SHAPES[shape]
    model = native(config, perturbed(config))
    model.save(tmp_path)
    opened, report = CLASSES[shape].from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) is CLASSES[shape]
    tokens = sample(config.vocab_size)
    np.testing.assert_allclose(our_logits(model, tokens), their_logits(opened, tokens), atol=1e-4, rtol=0)


SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
SAVED_BY_TRANSFORMERS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=24, n_layer=2, n_head=4, vocab_size=50, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SMALL, rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
        )
    ),
    "llama3 rotary": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SMALL,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        )
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SMALL, head_dim=10, tie_word_embeddings=True)
    ),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", SAVED_BY_TRANSFORMERS)
def test_what_transformers_saved_is_opened(kind: str, dtype: torch.dtype, sharded: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = SAVED_BY_TRANSFORMERS[kind]()
    for parameter in theirs.parameters():
        # Initial weights are small and biases 0: make every tensor count.
        parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    theirs = theirs.to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="10KB" if sharded else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if sharded else (tmp_path / "model.safetensors").exists()
    model = ingot.load_model(tmp_path)
    tokens = sample(50)
    # Weights of bf16 are exact in f32, where the computation is compared. Opened anew: `to` rounds rotary frequencies too.
    expected = their_logits(type(theirs).from_pretrained(tmp_path, dtype=torch.float32), tokens)
    np.testing.assert_allclose(our_logits(model, tokens), expected, atol=1e-4, rtol=0)
    on_torch = ingot.load_model(tmp_path, backend="torch", device="cpu")
    np.testing.assert_allclose(our_logits(on_torch, tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_network_comes_back_from_its_directory(shape: str, tmp_path: Path) -> None:
    config = SHAPES[shape]
    model = native(config, perturbed(config, 2), 2)
    model.save(tmp_path)
    again = ingot.load_model(tmp_path)
    assert again.config == config
    assert again.num_values == 2
    for name, array in model.state().items():
        np.testing.assert_array_equal(again.state()[name], array, err_msg=name)
    expected = {"gelu": "gpt2", "wide": "gpt2", "mixed": "ingot"}.get(shape, shape)
    assert family_of(config) == json.loads((tmp_path / "config.json").read_text())["model_type"] == expected


def test_networks_that_transformers_refuses_are_not_given_its_names(tmp_path: Path) -> None:
    # Its Llama wants a hidden size that divides by the heads, even beside a head_dim.
    config = dataclasses.replace(SHAPES["llama"], hidden_size=22)
    model = native(config, perturbed(config))
    model.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "ingot"
    assert ingot.load_model(tmp_path).config == config


def test_directories_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    config = SHAPES["gpt2"]
    native(config, perturbed(config)).save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"

    def refused(changed: dict[str, Any], message: str) -> None:
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            ingot.load_model(tmp_path)

    refused({key: array for key, array in weights.items() if key != name}, f"missing: {name}")
    refused(
        weights | {"transformer.h.7.ln_1.bias": np.zeros(21, dtype=np.float32)}, "surplus: transformer.h.7.ln_1.bias"
    )
    refused(weights | {name: np.ascontiguousarray(weights[name].T)}, r"c_fc.weight is \[29, 21\], not \[21, 29\]")
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ingot.load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        ingot.load_model(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"activation_function": "swish"}, "activation_function is 'swish'"),
        ({"n_head": 4}, "hidden_size 21 does not divide"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(CheckpointError, match=message):
            ingot.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        ingot.load_model(tmp_path)
