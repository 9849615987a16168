"""Talking with a model: the ids that it sees, the commands, and what Ctrl-C ends."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from ingot.cli import main
from ingot.data.chat import ChatEncoder, ChatTemplate
from ingot.data.rows import read_rows
from ingot.errors import ConfigError, DataError
from ingot.inference.chat import Conversation, talk
from ingot.inference.generate import generate
from ingot.models import Sampling, load_model
from ingot.tokenizer import Tokenizer
from ingot.training.companions import write_tokenizer_config
from killable_sft import write_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with a chat template and random weights: it writes noise, but always the same."""
    folder = tmp_path_factory.mktemp("talk") / "model"
    template = ChatTemplate.built_in()
    tokenizer = Tokenizer.bytes_only()
    tokenizer = tokenizer.with_special_tokens(template.missing_special_tokens(tokenizer))
    write_base(folder, vocab_size=tokenizer.vocab_size, max_position_embeddings=160)
    tokenizer.save(folder)
    write_tokenizer_config(folder, tokenizer, encoder=ChatEncoder(template, tokenizer))
    return folder


def conversation(folder: Path, **settings: Any) -> Conversation:
    encoder = ChatEncoder(ChatTemplate.of_model(folder), Tokenizer.from_file(folder))
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 1, **settings}
    return Conversation(load_model(folder, threads=1), encoder, Sampling(), **options)


def typed(talking: Conversation, *lines: str) -> str:
    out = io.StringIO()
    talk(talking, io.StringIO("".join(line + "\n" for line in lines)), out, interactive=False)
    return out.getvalue()


def test_each_answer_is_what_the_model_writes_after_the_whole_dialogue(folder):
    talking = conversation(folder, system="be brief")
    answers = ["".join(talking.say(text)) for text in ("hello", "and then?")]
    assert [message["role"] for message in talking.messages] == ["system", *["user", "assistant"] * 2]
    assert [m["content"] for m in talking.messages if m["role"] == "assistant"] == answers
    encoder = talking.encoder
    for count, answer in ((2, answers[0]), (4, answers[1])):
        ids = encoder.encode_prompt(talking.messages[:count]).tolist()
        (alone,) = generate(talking.model, encoder.tokenizer, [ids], max_new_tokens=12, seed=1, end_ids=encoder.end_ids)
        assert alone.text == answer


def test_the_end_of_a_turn_ends_the_answer_and_is_not_shown(folder):
    talking = conversation(folder, max_new_tokens=100)
    model, end = talking.model, talking.encoder.end_of_turn_id
    table = model.parameters["model.embed_tokens.weight"]
    before = table[end].copy()
    try:
        # All logits of one sign: a row many times as long is drawn sooner or later, at once or never.
        for factor in (200.0, -200.0):
            table[end] = factor * before
            text = "".join(talking.say("hi"))
            assert "<|im_end|>" not in text
            if len(text.encode()) < 50:
                return
    finally:
        table[end] = before
    raise AssertionError("the model never ended its turn")


def test_commands(folder, tmp_path):
    talking = conversation(folder)
    first = typed(talking, "hello").rstrip("\n")
    assert talking.messages[-1]["content"] == first
    again = typed(talking, "/regen").rstrip("\n")
    assert again != first
    assert [message["role"] for message in talking.messages] == ["user", "assistant"]
    assert typed(talking, "/reset", "hello").rstrip("\n") == f"forgotten\n{first}"
    assert "system message is set" in typed(talking, "/system be kind")
    assert talking.messages == [{"role": "system", "content": "be kind"}]
    assert "there is no answer yet" in typed(talking, "/regen")
    assert "nothing was said yet" in typed(talking, f"/save {tmp_path / 'd.jsonl'}")
    typed(talking, "hello", f"/save {tmp_path / 'd.jsonl'}", "bye", f"/save {tmp_path / 'd.jsonl'}")
    saved = list(read_rows(tmp_path / "d.jsonl"))
    assert [len(row.parts()[0] or ()) for row in saved] == [3, 5]
    assert saved[1].parts()[0] == talking.messages
    assert "there is no command /help" in typed(talking, "/help")
    assert "/save takes the name of a file" in typed(talking, "/save")
    assert "cannot be written" in typed(talking, f"/save {tmp_path / 'no' / 'd.jsonl'}")
    count = len(talking.messages)
    assert typed(talking, "", "/quit", "hello") == ""
    assert len(talking.messages) == count


def test_ctrl_c_ends_the_answer_and_not_the_chat(folder, monkeypatch):
    talking = conversation(folder)
    whole = "".join(talking.say("hello"))
    talking.reset()

    class Stopping(io.StringIO):
        pieces = 0

        def write(self, text: str) -> int:
            self.pieces += 1
            if self.pieces == 2:
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    out = Stopping()
    talk(talking, io.StringIO("hello\nstill there?\n"), out, interactive=False)
    assert " [stopped]\n" in out.getvalue()
    kept = talking.messages[1]["content"]
    assert whole.startswith(kept)
    assert 0 < len(kept) < len(whole)
    assert [message["role"] for message in talking.messages] == ["user", "assistant"] * 2
    assert out.getvalue().endswith(f"{talking.messages[3]['content']}\n")


def test_a_dialogue_beyond_the_context_and_settings_that_cannot_be(folder):
    talking = conversation(folder)
    assert "the model is made for 160: /reset begins again" in typed(talking, "x" * 200)
    assert talking.messages == []
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1"):
        conversation(folder, max_new_tokens=0)
    with pytest.raises(DataError, match="no answer yet"):
        talking.say_again()


def test_the_command_line_reads_a_script_and_gives_the_same_answers_again(folder, capsys, monkeypatch, tmp_path):
    outputs = []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"hello\n/save {tmp_path / 'd.jsonl'}\n"))
        assert main(["chat", str(folder), "--max-new-tokens", "5", "--seed", "3", "--threads", "1"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    saved = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert saved[0] == saved[1]
    assert outputs[0] == saved[0]["messages"][1]["content"] + f"\nsaved in {tmp_path / 'd.jsonl'}\n"
    assert main(["chat", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
