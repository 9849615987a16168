"""Configurations: what is filled in, what is refused, and that the option names do not change by accident."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.configs import (
    Architecture,
    ModelConfig,
    PretrainConfig,
    load_recipe,
    load_toml,
    parse_duration,
    recipe_names,
)
from ingot.errors import ConfigError


def test_gpt2_small_has_the_published_number_of_parameters():
    config = ModelConfig.gpt2(vocab_size=50257, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    # Radford et al. 2019 as counted by transformers: 124,439,808.
    assert config.num_parameters == 124_439_808


def test_number_of_parameters_agrees_with_transformers():
    import transformers

    ours = ModelConfig.llama(
        vocab_size=1000,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=256,
        tie_word_embeddings=False,
    )
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=1000,
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            intermediate_size=256,
            tie_word_embeddings=False,
        )
    )
    assert ours.num_parameters == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30}, "hidden_size 30 does not divide by num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 does not divide by num_key_value_heads 3"),
        ({"head_dim": 7}, "even head_dim"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"activation": "geglu"}, "activation must be one of"),
    ],
)
def test_numbers_that_do_not_fit_are_named(fields, message):
    valid = {"vocab_size": 10, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**valid, **fields})


def test_round_trip_through_plain_values():
    config = ModelConfig.gpt2(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="did you mean 'hidden_size'"):
        ModelConfig.from_dict({**config.to_dict(), "hiden_size": 3})


def test_pretrain_config_round_trip_through_toml(tmp_path):
    import tomli_w

    config = PretrainConfig(data=("a.txt",), max_steps=7, architecture=Architecture(family="gpt2", hidden_size=64))
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(config.to_dict()), encoding="utf-8")
    assert PretrainConfig.from_dict(load_toml(path)) == config


def test_unknown_keys_name_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'learning_rat'; did you mean 'learning_rate'"):
        PretrainConfig.from_dict({"learning_rat": 1.0})
    with pytest.raises(ConfigError, match=r"table \[model\]: unknown key 'width'"):
        PretrainConfig.from_dict({"model": {"width": 3}})
    with pytest.raises(ConfigError, match="did you mean 'shakespeare-char'"):
        load_recipe("shakespere-char")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('learning_rate = "fast"', "a.toml: learning_rate is 'fast'; give a number"),
        ('max_steps = "3"', "a.toml: max_steps is '3'; give a whole number"),
        ("max_steps = 1.5", "a.toml: max_steps is 1.5; give a whole number"),
        ("seed = true", "a.toml: seed is True; give a whole number"),
        ("data = 3", "a.toml: data is 3; give a list, each entry a text in quotes"),
        ('data = ["a", 3]', r"a.toml: data is \('a', 3\); give a list"),
        ("output = 3", "a.toml: output is 3; give a text in quotes"),
        ('lr_scheduler_type = "cosin"', "a.toml: lr_scheduler_type is 'cosin'; give one of cosine, wsd, linear"),
        ("model = 3", "a.toml: model is 3; give a text in quotes"),
        ('[model]\nhidden_size = "big"', r"a.toml, table \[model\]: hidden_size is 'big'; give a whole number"),
        ('[model]\ntie_word_embeddings = "yes"', "tie_word_embeddings is 'yes'; give true or false"),
    ],
)
def test_values_of_another_type_are_named(line, message, tmp_path):
    (tmp_path / "a.toml").write_text(line, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        PretrainConfig.from_dict(load_toml(tmp_path / "a.toml"), "a.toml")


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_is_a_valid_configuration(name):
    config = PretrainConfig.from_dict(load_recipe(name), name)
    assert config.architecture.resolve(config.vocab_size or 50257, config.sequence_length).num_parameters > 0


def test_nanogpt_recipe_has_its_published_settings():
    # https://github.com/karpathy/nanoGPT, README and config/train_shakespeare_char.py.
    config = PretrainConfig.from_dict(load_recipe("shakespeare-char-cpu"))
    shape = config.architecture
    assert (shape.num_hidden_layers, shape.num_attention_heads, shape.hidden_size, shape.dropout) == (4, 4, 128, 0.0)
    assert (config.max_length, config.per_device_train_batch_size, config.max_steps) == (64, 12, 2000)
    assert (config.learning_rate, config.learning_rate * config.min_learning_rate_ratio) == (1e-3, 1e-4)
    assert (config.warmup_steps, config.adam_beta2, config.weight_decay) == (100, 0.99, 0.1)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("12", 12)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@given(st.text(max_size=8))
def test_durations_are_positive_or_refused(text):
    with contextlib.suppress(ConfigError):
        assert parse_duration(text) > 0


def test_only_one_setting_fixes_the_length():
    with pytest.raises(ConfigError, match="max_steps and max_time"):
        PretrainConfig(max_steps=3, max_time="3m")


def test_option_names_are_frozen():
    """Renaming an option breaks people's files and scripts; change this list only on purpose."""
    names = {field.name for field in dataclasses.fields(PretrainConfig)}
    assert names == {
        *("data", "output", "tokenizer", "vocab_size", "model", "architecture", "separator", "windows", "held_out"),
        *("document_order", "optim", "muon_momentum"),
        *("max_length", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("max_steps", "num_train_epochs", "max_time"),
        *(
            "learning_rate",
            "min_learning_rate_ratio",
            "lr_scheduler_type",
            "warmup_steps",
            "warmup_ratio",
            "decay_ratio",
        ),
        *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "adam_eps_mode", "max_grad_norm"),
        *("logging_steps", "eval_steps", "eval_batches", "save_steps", "save_total_limit"),
        *("sample_prompt", "sample_tokens", "seed", "backend", "device", "precision", "threads", "level", "cache_dir"),
    }
