"""``ingot sample`` as a person types it: rows that ``ingot label`` reads, going on after a stop, several models, the best of n."""

from __future__ import annotations

import io
import json
import os
import signal
import sys

import numpy as np
import pytest

import ingot
from ingot.cli import main
from ingot.data.chat import ChatTemplate
from ingot.data.rows import Candidates, PromptCompletion, read_rows
from ingot.feedback.candidates import read_candidates
from ingot.feedback.journal import read_judgements
from ingot.feedback.schedule import shown_order
from ingot.tokenizer import Tokenizer

LETTERS = "ab"
END = "<|endoftext|>"
TURN = "<|im_end|>"


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """Nothing here cuts the power: a write need not wait for the disk, which may be busy."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save_model(folder, *, letters=LETTERS, chat=False, seed=0):
    """A model that writes one of ``letters`` or ends, each with the same chance at each place, whatever is asked."""
    tokenizer = Tokenizer.bytes_only()
    names = ["<|im_start|>", TURN, "<|pad|>"] if chat else []
    tokenizer = tokenizer.with_special_tokens([END, *names])
    config = ingot.ModelConfig.gpt2(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )
    model = ingot.Model(config, seed=seed, threads=1)
    weights = model.state()
    likely = [tokenizer.encode_ordinary(letter)[0] for letter in letters]
    likely.append(tokenizer.special_tokens[TURN if chat else END])
    weights["transformer.wte.weight"][:, 0] = -1.0
    weights["transformer.wte.weight"][likely, 0] = 1.0
    weights["transformer.ln_f.weight"][:] = 0.0
    weights["transformer.ln_f.bias"][:] = 0.0
    weights["transformer.ln_f.bias"][0] = 20.0
    model.load_state(weights)
    model.save(folder)
    tokenizer.save(folder)
    if chat:
        ChatTemplate.built_in().save(folder)
        tokens = {"bos_token": END, "eos_token": TURN, "pad_token": "<|pad|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("chatty"), chat=True)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def desk(tmp_path, capsys, plain):
    """Runs the command on a file of prompts."""

    class Desk:
        prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"question {n}", "topic": n} for n in range(12)])
        output = tmp_path / "candidates.jsonl"

        def sample(self, *more, model=(plain,), prompts=None, output=None):
            models = [word for folder in model for word in ("--model", str(folder))]
            files = ["--prompts", str(prompts or self.prompts), "--output", str(output or self.output)]
            try:
                self.code = main(["sample", *models, *files, "--max-new-tokens", "6", *map(str, more)])
            except SystemExit as stop:
                self.code = int(stop.code or 0)
            self.out, self.err = capsys.readouterr()
            return lines(output or self.output) if (output or self.output).exists() else []

        def error(self, *more, **options):
            self.sample(*more, **options)
            assert self.code in (1, 2)
            assert self.err.count("\n") == 1, self.err
            return self.err

    return Desk()


def test_rows_are_what_label_reads(desk, plain):
    rows = desk.sample()
    assert desk.code == 0, desk.err
    assert len(rows) == 12
    for row in rows:
        assert set(row) == {"prompt", "responses", "group_id", "sources", "truncated", "sampling", "topic"}
        assert 2 <= len(row["responses"]) <= 4
        assert len(set(row["responses"])) == len(row["responses"]) == len(row["sources"]) == len(row["truncated"])
        assert row["sources"] == [str(plain)] * len(row["responses"])
        for response, truncated in zip(row["responses"], row["truncated"], strict=True):
            assert response
            assert set(response) <= set(LETTERS)
            assert truncated == (len(response) == 6)
    assert sorted(row["topic"] for row in rows) == list(range(12))
    assert len({row["group_id"] for row in rows}) == 12
    found = read_candidates(desk.output)
    assert [group.responses for group in found.groups] == [tuple(row["responses"]) for row in rows]
    assert found.notices == []
    assert all(isinstance(row, Candidates) for row in read_rows(desk.output))
    assert f"12 rows added to {desk.output}." in desk.out
    assert "tokens/s" in desk.out


def longest_first(group, person):
    """What somebody types who likes what is long."""
    order = shown_order(len(group.responses), seed=0, labeler=person, group_id=group.group_id, repeat=0)
    lengths = [len(group.responses[place]) for place in order]
    return " ".join(
        "=".join(str(1 + shown) for shown, length in enumerate(lengths) if length == best)
        for best in sorted(set(lengths), reverse=True)
    )


def test_sample_label_agreement(desk, plain, tmp_path, monkeypatch, capsys):
    desk.sample("--json")
    facts = json.loads(desk.out)
    assert (facts["num_written"], facts["num_prompts"], facts["interrupted"]) == (12, 12, False)
    ranked = tmp_path / "ranked.jsonl"
    groups = read_candidates(desk.output).groups
    assert {len(group.responses) for group in groups} == {4}
    for person in ("me", "you"):
        typed = "".join(f"{longest_first(group, person)}\n" for group in groups)
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        command = ["label", str(desk.output), "--output", str(ranked), "--labeler", person]
        assert main([*command, "--no-ratings", "--questions", "--repeats", "0"]) == 0
    judged = read_judgements(ranked)
    assert len(judged) == 24
    for record in judged:
        assert record.source_models == (str(plain),) * 4
        by_rank = [len(response) for _, response in sorted(zip(record.ranks, record.responses, strict=True))]
        assert by_rank == sorted(by_rank, reverse=True)
    capsys.readouterr()
    assert main(["agreement", str(ranked)]) == 0
    assert "24 judgements of 12 groups by 2 people" in capsys.readouterr().out


def test_messages_go_through_the_template(desk, chatty, tmp_path):
    prompts = write(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": f"hi {n}"}]} for n in range(5)])
    rows = desk.sample(model=[chatty], prompts=prompts)
    assert desk.code == 0, desk.err
    assert len(rows) == 5
    for row in rows:
        assert row["prompt"][0]["role"] == "user"
        for response in row["responses"]:
            assert [message["role"] for message in response] == ["assistant"]
            assert set(response[0]["content"]) <= set(LETTERS)  # without the token that ends the turn
        assert False in row["truncated"]
    assert len(read_candidates(desk.output).groups) == 5
    assert all(row.conversational for row in read_rows(desk.output))


def test_messages_need_a_template(desk, tmp_path):
    prompts = write(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": "hi"}]}])
    text = desk.error(prompts=prompts)
    assert "row 1: the prompt is a list of messages, but the tokenizer has no special token <|im_start|>" in text
    assert "ingot sft" in text


def test_a_response_depends_on_seed_prompt_and_number_alone(desk, tmp_path):
    rows = {row["prompt"]: row["responses"] for row in desk.sample()}
    shuffled = write(tmp_path / "other.jsonl", [{"prompt": f"question {n}"} for n in (7, 3, 11)])
    for slots, name in ((1, "a"), (64, "b")):
        again = desk.sample("--max-sequences", slots, "--threads", slots % 3, prompts=shuffled, output=tmp_path / name)
        assert {row["prompt"]: row["responses"] for row in again} == {
            f"question {n}": rows[f"question {n}"] for n in (7, 3, 11)
        }
    desk.sample(output=tmp_path / "same")
    assert (tmp_path / "same").read_bytes() == desk.output.read_bytes()
    other = desk.sample("--seed", 1, output=tmp_path / "c")
    assert {row["prompt"]: row["responses"] for row in other} != rows
    doubled = write(tmp_path / "twice.jsonl", [{"prompt": "question 7"}, {"prompt": "question 7"}])
    first, second = desk.sample(prompts=doubled, output=tmp_path / "d")
    assert first["responses"] == rows["question 7"]
    assert first["responses"] != second["responses"]
    assert first["group_id"] != second["group_id"]


def test_going_on_after_a_stop_gives_the_same_rows(desk, tmp_path):
    whole = desk.sample()
    few = write(tmp_path / "few.jsonl", [{"prompt": f"question {n}", "topic": n} for n in range(5)])
    part = tmp_path / "part.jsonl"
    desk.sample(prompts=few, output=part)
    before = part.read_text()
    # A power cut in the middle of a line.
    part.write_text(before + '{"prompt": "question 5", "respo')
    rows = desk.sample(output=part)
    assert part.read_text().startswith(before)
    assert {row["group_id"]: row for row in rows} == {row["group_id"]: row for row in whole}
    assert "cut short" in desk.out
    assert "7 rows added" in desk.out
    assert "5 of them in" in desk.out
    desk.sample(output=part)
    assert "0 rows added" in desk.out
    assert lines(part) == rows


def test_ctrl_c_keeps_what_is_complete(desk, monkeypatch):
    from ingot.training.rollouts import EpisodeStream

    count = 0
    step = EpisodeStream.step

    def interrupting(self):
        nonlocal count
        count += 1
        if count == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(EpisodeStream, "step", interrupting)
    rows = desk.sample("--max-sequences", 4)
    assert desk.code == 130
    assert 0 < len(rows) < 12
    assert "the same command goes on" in desk.out
    monkeypatch.undo()
    rest = desk.sample("--max-sequences", 4)
    assert desk.code == 0
    assert rest[: len(rows)] == rows
    whole = desk.sample(output=desk.output.with_name("whole.jsonl"))
    assert sorted(rest, key=json.dumps) == sorted(whole, key=json.dumps)


def test_other_settings_do_not_mix(desk):
    desk.sample()
    assert "row 1: was sampled with temperature 1.0, not 0.5; give the same settings" in desk.error(
        "--temperature", 0.5
    )
    assert "num_generations 4, not 3" in desk.error("--num-generations", 3)
    desk.output.write_text('{"prompt": "x"}\n')
    assert "row 1: not written by ingot sample; give another --output" in desk.error()


def test_several_models_take_turns_and_are_named(desk, plain, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    save_model(folder, letters="xy")
    rows = desk.sample("--num-generations", 5, model=[plain, folder])
    assert desk.code == 0, desk.err
    for row in rows:
        for response, source in zip(row["responses"], row["sources"], strict=True):
            assert set(response) <= set("ab" if source == str(plain) else "xy")
    assert {source for row in rows for source in row["sources"]} == {str(plain), str(folder)}
    sizes = {(row["sources"].count(str(plain)), row["sources"].count(str(folder))) for row in rows}
    assert (3, 2) in sizes
    assert "1 responses for each prompt are too few for 2 models" in desk.error(
        "--best-of", 1, "--reward", "builtins.sorted", model=[plain, folder]
    )


def test_redrawn_or_dropped(desk, tmp_path):
    dropped = desk.sample("--duplicates", "drop", "--json")
    facts = json.loads(desk.out)
    assert facts["num_redrawn"] == 0
    assert facts["num_dropped"] > 0
    assert facts["num_responses"] == 48
    assert facts["num_written"] + facts["num_alike"] == 12
    assert sum(len(row["responses"]) for row in dropped) + facts["num_dropped"] <= 48
    redrawn = desk.sample("--json", output=tmp_path / "redrawn")
    facts = json.loads(desk.out)
    assert facts["num_redrawn"] > 0
    assert facts["num_responses"] == 48 + facts["num_redrawn"]
    assert sum(len(row["responses"]) for row in redrawn) > sum(len(row["responses"]) for row in dropped)
    by_prompt = {row["prompt"]: row["responses"] for row in redrawn}
    for row in dropped:  # what was good is kept
        assert set(row["responses"]) <= set(by_prompt[row["prompt"]])


REWARD = "def length(completions, **columns):\n    return [float(len(c)) for c in completions]\n"


def test_the_best_of_n_is_a_row_to_fine_tune_on_and_the_curve_is_right(desk, tmp_path):
    (tmp_path / "r.py").write_text(REWARD)
    prompts = write(tmp_path / "many.jsonl", [{"prompt": f"q{n}"} for n in range(400)])
    rows = desk.sample("--best-of", 4, "--reward", f"{tmp_path}/r.py:length", "--json", prompts=prompts)
    assert desk.code == 0, desk.err
    facts = json.loads(desk.out)
    assert facts["num_responses"] == 1600
    assert len(rows) + facts["num_alike"] == 400
    for row in rows:
        assert len(row["rewards"]) == 4
        assert row["reward"] == max(row["rewards"]) == len(row["completion"])
    assert all(isinstance(row, PromptCompletion) for row in read_rows(desk.output))
    # Three tokens are equally likely, one of them the end: P(length >= l) = (2/3)^l up to 6.
    survival = (2 / 3) ** np.arange(1, 7)
    for point in facts["curve"]:
        n = point["n"]
        expected = (1 - (1 - survival) ** n).sum()
        assert point["reward"] == pytest.approx(expected, abs=5 * 2.1 / np.sqrt(1600 / n))
    assert [point["n"] for point in facts["curve"]] == [1, 2, 3, 4]
    assert facts["curve"][3]["kl"] == pytest.approx(np.log(4) - 3 / 4)
    desk.sample("--best-of", 4, "--reward", f"{tmp_path}/r.py:length", prompts=prompts)
    assert "best of n" in desk.out
    assert "0.636 nats" in desk.out


def test_a_threshold_and_functions_that_do_not_apply(desk, tmp_path):
    (tmp_path / "r.py").write_text(
        REWARD + "def odd(completions, topic, **_):\n    return [None if t % 2 else 1.0 for t in topic]\n"
    )
    best = ("--best-of", 4, "--reward", f"{tmp_path}/r.py:length", "--reward-threshold", 4)
    rows = desk.sample(*best, "--json")
    facts = json.loads(desk.out)
    assert 0 < len(rows) < 12
    assert len(rows) + facts["num_below"] + facts["num_alike"] == 12
    assert all(row["reward"] >= 4 for row in rows)
    odd = desk.sample("--best-of", 4, "--reward", f"{tmp_path}/r.py:odd", output=tmp_path / "odd")
    assert {row["topic"] % 2 for row in odd} == {0}
    both = ("--reward", f"{tmp_path}/r.py:length", "--reward", f"{tmp_path}/r.py:odd", "--reward-weights", 1, 10)
    scored = desk.sample(*both, output=tmp_path / "scored")
    for row in scored:
        extra = 0 if row["topic"] % 2 else 10
        assert row["rewards"] == [len(response) + extra for response in row["responses"]]


def test_a_reward_that_fails_loses_no_row(desk, tmp_path):
    (tmp_path / "r.py").write_text(
        "import pathlib\ndef score(prompts, completions, **_):\n"
        "    if pathlib.Path(__file__).with_name('fail').exists():\n        raise OSError('no network')\n"
        "    return [0.0] * len(completions)\n"
    )
    few = write(tmp_path / "few.jsonl", [{"prompt": f"question {n}", "topic": n} for n in range(3)])
    reward = ("--reward", f"{tmp_path}/r.py:score")
    before = desk.sample(*reward, prompts=few)
    (tmp_path / "fail").touch()
    assert "raised OSError: no network (r.py, line 4)" in desk.error(*reward)
    assert lines(desk.output) == before
    (tmp_path / "fail").unlink()
    assert desk.sample(*reward)[:3] == before
    assert len(lines(desk.output)) == 12


def test_prompts_that_are_too_long_are_left_out_and_counted(desk, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "x" * n} for n in (3, 62, 63, 100)])
    rows = desk.sample(prompts=prompts)
    assert {row["prompt"] for row in rows} == {"x" * 3, "x" * 62}
    assert "2 prompts left out (row 3 first): no room to answer in the model's context of 64 tokens" in desk.out


def test_a_dry_run_draws_nothing(desk):
    desk.sample("--dry-run")
    assert desk.code == 0
    assert not desk.output.exists()
    assert "12 prompts; 48 responses of up to 6 tokens would be drawn. Nothing was written." in desk.out
    desk.sample("--dry-run", "--json")
    assert json.loads(desk.out)["dry_run"] is True


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-generations", 1], "num_generations is 1: to compare, give at least 2"),
        (["--best-of", 4], "give a reward too"),
        (["--reward-threshold", 1], "give best_of too"),
        (["--temperature", 0], "temperature 0 always draws the same"),
        (["--reward-weights", 1], "--reward-weights weighs rewards: give --reward too"),
        (["--reward", "./gone.py:f"], "./gone.py: no such file"),
        (["--max-sequences", 0], "max_sequences must be at least 1"),
    ],
)
def test_flags_that_do_not_fit(desk, flags, words):
    assert words in desk.error(*flags)
    assert desk.code == 2


def test_bad_prompts_are_named(desk, tmp_path):
    path = write(tmp_path / "bad.jsonl", [{"prompt": "x"}, {"prompt": ""}])
    assert f'{path}, row 2: field "prompt" is empty' in desk.error(prompts=path)
    path = write(tmp_path / "ids.jsonl", [{"prompt": "x", "group_id": 1}, {"prompt": "y", "group_id": "1"}])
    assert "row 2: \"group_id\" '1' is that of row 1" in desk.error(prompts=path)
    assert "no such file" in desk.error(prompts=tmp_path / "gone.jsonl")
    assert "is also what is read" in desk.error(output=desk.prompts)


def test_rejection_sampling_is_sampling_and_fine_tuning_in_turn(tmp_path, capsys):
    """The best of eight goes straight into fine-tuning, and the model writes such answers by itself afterwards."""
    from killable_dpo import write_chat_model

    write_chat_model(tmp_path / "round0", initializer_range=0.1)
    (tmp_path / "r.py").write_text(
        "def letters(completions, **_):\n    return [sum('a' <= x <= 'z' for x in c[0]['content']) for c in completions]\n"
    )
    asked = [{"prompt": [{"role": "user", "content": f"{n}?"}]} for n in range(60)]
    prompts = write(tmp_path / "prompts.jsonl", asked)
    means = []
    for number in range(3):
        model, best = str(tmp_path / f"round{number}"), str(tmp_path / f"best{number}.jsonl")
        common = ["--model", model, "--threads", "1"]
        drawn = [
            "--prompts",
            str(prompts),
            "--max-new-tokens",
            "6",
            "--reward",
            f"{tmp_path}/r.py:letters",
            "--best-of",
            "8",
        ]
        assert main(["sample", *common, *drawn, "--output", best, "--json"]) == 0
        means.append(json.loads(capsys.readouterr().out)["curve"][0]["reward"])
        learned = [
            "--data",
            best,
            "--output",
            str(tmp_path / f"round{number + 1}"),
            "--learning-rate",
            "1e-2",
            "--held-out",
            "0",
        ]
        if number < 2:
            assert main(["sft", *common, *learned, "--max-steps", "40", "--sample-tokens", "0", "--json"]) == 0
            capsys.readouterr()
    assert means[0] < 1.0
    assert means[1] > means[0] + 0.2
    assert means[2] > means[1] + 0.1
