"""Generation: batches, streaming, stop strings and characters that come in parts."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

import ingot
from ingot.errors import ConfigError
from ingot.inference.generate import Completion, generate, stream
from ingot.models.base import Model
from ingot.tokenizer import Tokenizer

CORPUS = ["the cat sat on the mat. the dog sat on the log. the cat and the dog sat. " * 20, "äöü €uro " * 30]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return ingot.Tokenizer.train(iter(CORPUS), vocab_size=280, special_tokens=["<|endoftext|>"])


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Model:
    """A few steps on the corpus, so that texts differ and end."""
    make = ingot.ModelConfig.gpt2 if request.param == "gpt2" else ingot.ModelConfig.llama
    config = make(
        vocab_size=284, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    )
    model = ingot.Model(config, seed=1)
    end = tokenizer.eos_token_id
    assert end is not None
    rng = np.random.default_rng(0)
    ids = np.concatenate([tokenizer.encode_to_numpy(text) for text in CORPUS]).astype(np.int32)
    for _ in range(60):
        starts = rng.integers(0, len(ids) - 16, 8)
        rows = [[end, *ids[start : start + rng.integers(4, 16)].tolist()] for start in starts]
        tokens = np.array([token for row in rows for token in row], np.int32)
        targets = np.array([token for row in rows for token in [*row[1:], end]], np.int32)
        offsets = np.cumsum([0, *map(len, rows)])
        model.zero_grad()
        model.forward_backward(tokens, offsets, targets, np.full(len(tokens), 1 / len(tokens), np.float32))
        model.step(5e-3)
    return model


def joined(model: Model, tokenizer: Tokenizer, prompt: Any, **options: Any) -> str:
    return "".join(stream(model, tokenizer, prompt, **options))


PROMPTS = ["the cat", "", "the dog sat", "ä", "the cat"]


# ---- batches


def test_samples_do_not_depend_on_the_batch(model: Model, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "num_samples": 4, "seed": 7}
    everything = generate(model, tokenizer, PROMPTS, **options)
    assert len(everything) == 20
    assert [c.prompt for c in everything] == [prompt for prompt in PROMPTS for _ in range(4)]
    assert len({c.text for c in everything}) > 12
    # The same prompt at another index is another sample.
    assert everything[:4] != everything[16:]
    for batch_size in (1, 3, 7, 100):
        assert generate(model, tokenizer, PROMPTS, batch_size=batch_size, **options) == everything
    assert generate(model, tokenizer, PROMPTS[:1], **options) == everything[:4]
    assert generate(model, tokenizer, PROMPTS[:1], **{**options, "num_samples": 2}) == everything[:2]
    assert generate(model, tokenizer, PROMPTS, **{**options, "seed": 8}) != everything
    for index in range(4):
        assert (
            joined(model, tokenizer, PROMPTS[0], sample_index=index, max_new_tokens=30, seed=7)
            == everything[index].text
        )


def test_logprobs_are_those_of_training(model: Model, tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_token_id
    banned = range(tokenizer.vocab_size, model.config.vocab_size)
    for c in generate(model, tokenizer, ["the cat"], num_samples=5, max_new_tokens=40, temperature=0.7, top_k=20):
        prompt = [end, *tokenizer.encode("the cat")]
        tokens = np.array(prompt + c.token_ids, np.int32)
        _, out = model.forward(
            tokens[:-1],
            np.array([0, len(tokens) - 1]),
            tokens[1:].copy(),
            temperature=0.7,
            banned_ids=banned,
            train=False,
        )
        expected = out.logprobs[len(prompt) - 1 :]
        np.testing.assert_array_equal(np.float32(c.logprobs).view(np.uint32), expected.view(np.uint32))


def test_ids_are_taken_as_they_are(model: Model, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.eos_token_id, *tokenizer.encode("the cat")]
    text, raw = (generate(model, tokenizer, [prompt], seed=2)[0] for prompt in ("the cat", ids))
    assert (raw.text, raw.token_ids) == (text.text, text.token_ids)
    # Without the end-of-text token before them they are another prompt.
    assert generate(model, tokenizer, [ids[1:]], seed=2)[0].logprobs != text.logprobs


def test_ids_beyond_the_tokenizer_are_never_drawn(model: Model, tokenizer: Tokenizer) -> None:
    completions = generate(model, tokenizer, [""] * 40, temperature=50.0, stop_at_end_of_text=False, max_new_tokens=50)
    drawn = {token for c in completions for token in c.token_ids}
    assert max(drawn) < tokenizer.vocab_size < model.config.vocab_size
    assert tokenizer.eos_token_id in drawn


# ---- ends


def test_reasons_to_end(model: Model, tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_token_id
    completions = generate(model, tokenizer, ["the cat"] * 30, max_new_tokens=12, stop=["dog", "lo"], seed=3)
    assert {c.finish_reason for c in completions} == {"end_of_text", "stop", "length"}
    for c in completions:
        whole = tokenizer.decode(c.token_ids)
        if c.finish_reason == "end_of_text":
            assert c.token_ids[-1] == end
            assert c.text == tokenizer.decode(c.token_ids[:-1])
        else:
            assert end not in c.token_ids
        if c.finish_reason == "stop":
            places = [place for place in (whole.find("dog"), whole.find("lo")) if place >= 0]
            assert c.text == whole[: min(places)]
        else:
            assert "dog" not in c.text
            assert "lo" not in c.text
        if c.finish_reason == "length":
            assert len(c.token_ids) == 12
            assert c.text == whole


def test_a_full_context_moves_on_to_its_second_half() -> None:
    tokenizer = ingot.Tokenizer.bytes_only()
    config = ingot.ModelConfig.gpt2(
        vocab_size=256, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=20
    )
    model = ingot.Model(config)
    (c,) = generate(model, tokenizer, ["x" * 15], max_new_tokens=100)
    assert (len(c.token_ids), c.finish_reason) == (100, "length")
    ids = np.array([*tokenizer.encode("x" * 15), *c.token_ids], np.int32)
    for first, last in ((0, 20), (10, 30), (20, 40)):
        window = ids[first:last]
        _, out = model.forward(window[:-1], np.array([0, 19]), window[1:], train=False)
        # The first window's new tokens begin at 15; each later one's after the half that it kept.
        new = 14 if first == 0 else 9
        np.testing.assert_array_equal(out.logprobs[new:], c.logprobs[first + new + 1 - 15 : last - 15])
    with pytest.raises(
        ConfigError, match="prompt 1 has 20 tokens, which leaves no room in the model's 20 learned positions"
    ):
        generate(model, tokenizer, ["x", "x" * 20])
    rotary = ingot.Model(
        ingot.ModelConfig.llama(
            vocab_size=256, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=20
        )
    )
    (c,) = generate(rotary, tokenizer, ["x" * 15], max_new_tokens=100)
    assert len(c.token_ids) == 100


# ---- streaming


class Scripted:
    """A tokenizer and a model's decoder in one, that writes given tokens: each token is some bytes."""

    eos_token_id = None

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.vocab_size = len(pieces)
        self.config = ingot.ModelConfig.llama(
            vocab_size=len(pieces), hidden_size=2, num_hidden_layers=1, num_attention_heads=1, head_dim=2
        )

    def encode_ordinary(self, text: str) -> list[int]:
        return [0] * len(text)

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token]

    def decoder(self, *_: Any, **__: Any) -> Scripted:
        self.position = 0
        return self

    def add(self, *_: Any) -> int:
        return 0

    def remove(self, slot: int) -> None:
        del slot

    def step(self) -> ingot.models.base.DecodeStep:
        token = self.position
        self.position += 1
        one = np.zeros(1, np.float32)
        return ingot.models.base.DecodeStep(np.zeros(1, np.int32), np.array([token], np.int32), one, one)


def pieces_of(script: list[bytes], stop: list[str] | None = None) -> list[str]:
    scripted: Any = Scripted(script)
    pieces = list(stream(scripted, scripted, "x", max_new_tokens=len(script), stop=stop or []))
    (whole,) = generate(scripted, scripted, ["x"], max_new_tokens=len(script), stop=stop or [])
    assert "".join(pieces) == whole.text
    return pieces


def test_incomplete_characters_are_held_back() -> None:
    euro = "€".encode()
    assert pieces_of([b"a", euro[:1], euro[1:2], euro[2:], b"b"]) == ["a", "€", "b"]
    assert pieces_of([b"a", euro[:2]]) == ["a", "�"]
    assert pieces_of([b"a", euro[:2], b"b"]) == ["a", "�b"]
    assert pieces_of([b"\xff", b"a"]) == ["�", "a"]


def test_beginnings_of_stop_strings_are_held_back() -> None:
    assert pieces_of([b"one ", b"E", b"N", b"D", b"two"], ["END"]) == ["one "]
    assert pieces_of([b"one ", b"E", b"N", b"d", b"two"], ["END"]) == ["one ", "ENd", "two"]
    assert pieces_of([b"aa", b"ab"], ["aab"]) == ["a"]
    assert pieces_of([b"x", b"ababab", b"c!"], ["ababc"]) == ["x", "ab"]
    assert pieces_of([b"one\n", b"\nmore"], ["\n\n", "more"]) == ["one"]
    # The one that appears first ends the text, whichever was asked for first.
    assert pieces_of([b"tell me more or less"], ["less", "more"]) == ["tell me "]
    assert pieces_of([b"on", b"e E", b"N"], ["END"]) == ["on", "e ", "EN"]


def test_stop_strings_of_parts_of_characters_work() -> None:
    euro = "€".encode()
    assert pieces_of([b"5", euro[:1], euro[1:], b"!"], ["€"]) == ["5"]


def test_callback_gets_what_the_stream_gives(model: Model, tokenizer: Tokenizer) -> None:
    heard: dict[tuple[int, int], str] = defaultdict(str)

    def listen(prompt: int, sample: int, piece: str) -> None:
        assert piece
        heard[prompt, sample] += piece

    completions = generate(
        model, tokenizer, PROMPTS, num_samples=2, max_new_tokens=20, stop="og", batch_size=3, on_token=listen
    )
    assert [heard[i // 2, i % 2] for i in range(10)] == [c.text for c in completions]


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"stop": ["x", ""]}, "a stop string is empty"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"seed": -1}, "seed must be between 0"),
        ({"prompts": "the cat"}, "prompts takes a list of prompts"),
    ],
)
def test_settings_are_checked(model: Model, tokenizer: Tokenizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(model, tokenizer, **{"prompts": ["the cat"], **options})


def test_stream_checks_before_the_first_piece(model: Model, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="sample_index must be 0 or more"):
        stream(model, tokenizer, "x", sample_index=-1)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        stream(model, tokenizer, "x", max_new_tokens=0)


def test_tokenizer_must_fit(model: Model) -> None:
    large = ingot.Tokenizer.train(iter(CORPUS), vocab_size=288, special_tokens=["<|endoftext|>"])
    with pytest.raises(ConfigError, match="the tokenizer has 288 tokens but the model only 284"):
        generate(model, large, ["x"])
    with pytest.raises(ConfigError, match="prompt 0 is empty, and the tokenizer has no end-of-text token"):
        generate(model, ingot.Tokenizer.bytes_only(), [""])


def test_no_prompts_give_no_completions(model: Model, tokenizer: Tokenizer) -> None:
    nothing: list[Completion] = generate(model, tokenizer, [])
    assert nothing == []
