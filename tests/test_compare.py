"""Comparing models: figures against what is known beforehand, both orders, proxies, people, files, best of n, and bad input."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingot
from ingot.cli import main
from ingot.configs import ModelConfig
from ingot.data.chat import ChatEncoder, ChatTemplate
from ingot.errors import ConfigError, DataError
from ingot.feedback.candidates import Group
from ingot.feedback.journal import Journal
from ingot.feedback.session import Judgement, Session, Showing, collect
from ingot.inference.answers import Case
from ingot.inference.compare import compare_models, judgements_file, length_weights, training_rewards
from ingot.inference.judges import PairJudge, groups_of, judged_by_people
from ingot.inference.scoring import RewardModel
from ingot.models import Model, load_model
from ingot.tokenizer import Tokenizer
from ingot.training.companions import write_tokenizer_config
from ingot.training.rewards import RewardError
from killable_reward import write_policy
from killable_sft import write_rows

NUM = 48


def write_writer(folder: Path, liking: float) -> None:
    """A network of random weights, to whose logit of the letter a so much is added everywhere."""
    write_policy(folder)
    vocab_size = load_model(folder).config.vocab_size
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 96}
    model = Model(ModelConfig.gpt2(vocab_size=vocab_size, tie_word_embeddings=False, **shape), seed=3)
    model.parameters["transformer.ln_f.bias"][0] = 1.0
    model.parameters["lm_head.weight"][ord("a"), 0] += liking
    model.save(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts, a model, and another that writes the letter a far more often."""
    folder = tmp_path_factory.mktemp("compare")
    write_rows(
        folder / "prompts.jsonl", [{"prompt": [{"role": "user", "content": f"{n}?"}], "answer": n} for n in range(NUM)]
    )
    for name in ("plain", "keen"):
        write_writer(folder / name, 2.5 if name == "keen" else 0.0)
    return folder


def lines_of(file: Path) -> list[str]:
    return [line.decode() for line in file.read_bytes().split(b"\n") if line]


def letters(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(text(each).count("a")) for each in completions]


def text(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer[0]["content"]


def run(place: Path, judge: Any, models: tuple[str, ...] = ("plain", "keen"), **options: Any) -> Any:
    fixed = {"max_new_tokens": 12, "threads": 1}
    return compare_models(
        [str(place / model) for model in models], str(place / "prompts.jsonl"), judge, **{**fixed, **options}
    )


def test_who_writes_more_of_a_letter_wins(place):
    found = run(place, letters)
    (pair,) = found.pairs
    assert (pair.source, pair.against) == (str(place / "keen"), str(place / "plain"))
    assert pair.wins + pair.ties + pair.losses == NUM == found.num_prompts == found.num_cases
    assert pair.win_rate.value == pytest.approx((pair.wins + pair.ties / 2) / NUM)
    assert pair.win_rate.low > 0.5
    plain, keen = found.sources
    assert keen.mean_score > plain.mean_score
    assert keen.mean_score - plain.mean_score > 0.5
    assert 0 <= plain.eos_rate <= 1
    assert found.kind == "judge"
    assert pair.flipped is None
    assert found.gate is None
    turned = run(place, lambda prompts, completions: [-each for each in letters(prompts, completions)]).pairs[0]
    assert turned.win_rate.value == pytest.approx(1 - pair.win_rate.value)
    assert turned.win_rate.low == pytest.approx(1 - pair.win_rate.high)


def test_the_same_weights_tie_everywhere(place, tmp_path):
    write_writer(tmp_path / "twin", 0.0)
    found = run(place, letters, models=("plain", str(tmp_path / "twin")))
    assert found.pairs[0].ties == NUM
    assert found.pairs[0].win_rate.value == 0.5


def test_a_judge_of_pairs_is_asked_in_both_orders(place):
    seen: list[tuple[str, str, int]] = []

    def first_one(prompts: Any, first: Any, second: Any, answer: Any) -> list[str]:
        seen.extend((text(a), text(b), n) for a, b, n in zip(first, second, answer, strict=True))
        return ["first"] * len(first)

    biased = run(place, first_one).pairs[0]
    same = NUM - len(seen) // 2
    assert biased.ties == NUM
    assert biased.flipped == pytest.approx((NUM - same) / NUM)
    assert biased.win_rate.value == 0.5
    half = len(seen) // 2
    assert [(a, b, n) for a, b, n in seen[:half]] == [(a, b, n) for b, a, n in seen[half:]]

    def counts(prompts: Any, first: Any, second: Any, **columns: Any) -> list[str]:
        signs = [np.sign(b - a) for a, b in zip(letters(prompts, first), letters(prompts, second), strict=True)]
        return [{-1: "first", 0: "tie", 1: "second"}[int(sign)] for sign in signs]

    steady = run(place, counts).pairs[0]
    assert steady.flipped == 0.0
    by_score = run(place, letters).pairs[0]
    assert (steady.wins, steady.ties, steady.losses) == (by_score.wins, by_score.ties, by_score.losses)
    silent = run(place, lambda prompts, first, second: [None] * len(first)).pairs[0]
    assert silent.num_unjudged == NUM - same


def test_verdicts_that_lean_are_ties():
    """A verdict in one order and a tie in the other turns with the order as well."""
    cases = [Case(str(n), str(n), "q", {}, ["x", "y"], ["a", "b"], [False, False], [1, 1]) for n in range(4)]
    answers = iter([["second", "first", "tie", "second"], ["first", "first", "first", None]])
    outcomes, flipped = PairJudge(lambda prompts, first, second: next(answers), "j").compare(cases, 0, 1)
    np.testing.assert_array_equal(outcomes, [1.0, 0.5, 0.5, np.nan])
    assert flipped.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (["first"], r"judge .*: returned 1 verdicts for \d+ pairs"),
        (["a"] * NUM, r"""returned 'a' for pair 0; return "first", "second", "tie" or None"""),
        (None, "raised TypeError"),
    ],
)
def test_a_judge_that_fails_is_one_line(place, returned, message):
    def judge(prompts: Any, first: Any, second: Any) -> Any:
        return returned if returned is None or len(returned) == 1 else returned[: len(first)]

    with pytest.raises(RewardError, match=message) as caught:
        run(place, judge)
    assert "\n" not in str(caught.value)


def test_several_answers_to_a_prompt_stand_together(place):
    found = run(place, letters, num_generations=3)
    assert (found.num_prompts, found.num_cases) == (NUM, 3 * NUM)
    (pair,) = found.pairs
    assert pair.win_rate.num_prompts == NUM
    assert pair.win_rate.num_cases == 3 * NUM
    # The first answers are those that are drawn alone.
    alone = run(place, letters)
    assert abs(alone.pairs[0].win_rate.value - pair.win_rate.value) < 0.15


def test_lengths_are_matched():
    """A longer answer always wins: where both are as often longer, nobody wins; what has no counterpart is left out."""
    first = np.array([100] * 6)
    second = np.array([150, 150, 150, 67, 100, 300])
    weights = length_weights(first, second)
    np.testing.assert_allclose(weights, [1 / 3, 1 / 3, 1 / 3, 1, 1, 0])
    hits = np.array([1, 1, 1, 0, 0.5, 1])
    assert weights @ hits / weights.sum() == pytest.approx(0.5)
    assert length_weights([], []).size == 0


def test_a_reward_model_judges_and_is_called_a_proxy_where_it_was_trained_against(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    template = ChatTemplate.of_model(place / "plain")
    encoder = ChatEncoder(template, Tokenizer.from_file(place / "plain"))
    model = Model(load_model(place / "plain").config, seed=4, num_values=1)
    RewardModel(model, encoder).save("rm")
    encoder.tokenizer.save("rm")
    write_tokenizer_config(Path("rm"), encoder.tokenizer, encoder=encoder)
    arguments = ["compare", str(place / "plain"), "tuned", "--prompts", str(place / "prompts.jsonl"), "--judge", "./rm"]
    arguments += ["--max-new-tokens", "8", "--threads", "1"]
    (tmp_path / "tuned").symlink_to(place / "keen")
    assert main(arguments) == 0
    assert "proxy" not in capsys.readouterr().out
    # Trained against it two runs before.
    (tmp_path / "tuned").unlink()
    write_writer(tmp_path / "tuned", 0.5)
    (tmp_path / "tuned" / "run.json").write_text(json.dumps({"config": {"model": "middle"}}))
    (tmp_path / "middle").mkdir()
    (tmp_path / "middle" / "run.json").write_text(
        json.dumps({"config": {"model": "tuned", "reward_model": "rm", "reward": ["a.py:f"]}})
    )
    assert training_rewards("tuned") == ["rm", "a.py:f"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "judge: proxy ./rm" in printed
    assert "tuned was trained against it" in printed
    assert "proxy win rate" in printed
    assert "proxy score" in printed
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["judge_kind"], facts["proxy_of"]) == ("proxy", ["tuned"])
    # Another criterion of it is no other judge.
    assert (
        compare_models([str(place / "plain"), "tuned"], place / "prompts.jsonl", "rm:reward", max_new_tokens=4).kind
        == "proxy"
    )


def test_what_was_drawn_is_kept_and_judged_again(place, tmp_path):
    output = tmp_path / "answers.jsonl"
    found = run(place, letters, output=output)
    lines = lines_of(output)
    assert len(lines) == NUM
    rows = [json.loads(line) for line in lines]
    assert rows[0]["sources"] == [str(place / "plain"), str(place / "keen")]
    assert rows[0]["scores"]["letters"] == [float(text(each).count("a")) for each in rows[0]["responses"]]
    assert [row["answer"] for row in rows] == list(range(NUM))

    def longer(prompts: Any, completions: Any) -> list[float]:
        return [float(len(text(each))) for each in completions]

    # Half of it was lost, and the last line is torn: the rest is drawn as it would have been.
    output.write_text("\n".join(lines[: NUM // 2]) + "\n" + lines[NUM // 2][:50])
    again = run(place, longer, output=output)
    assert any("cut short" in notice for notice in again.notices)
    kept = {row["group_id"]: row for row in map(json.loads, lines_of(output))}
    assert {key: row["responses"] for key, row in kept.items()} == {row["group_id"]: row["responses"] for row in rows}
    assert set(kept[rows[0]["group_id"]]["scores"]) == {"letters", "longer"}
    assert run(place, letters, output=output).pairs == found.pairs
    with pytest.raises(ConfigError, match=r"row 1: was drawn with seed 0, not 1; give the same settings"):
        run(place, letters, output=output, seed=1)
    write_rows(tmp_path / "other.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError, match=r"other\.jsonl, row 1: not written by ingot compare"):
        run(place, letters, output=tmp_path / "other.jsonl")


def test_a_person_judges_blind_and_can_stop_and_go_on(place, tmp_path):
    output = tmp_path / "answers.jsonl"
    asked = 0

    def judge(showing: Showing) -> Judgement:
        nonlocal asked
        asked += 1
        counts = [text(each).count("a") for each in showing.responses]
        levels = sorted(set(counts), reverse=True)
        return Judgement(ranks=tuple(levels.index(count) + 1 for count in counts))

    def ask(groups: Any, file: Path, limit: int | None = 10) -> None:
        session = Session(groups, Journal(file), labeler="eve", repeats=0.0, gold_share=0.0)
        collect(session, judge, limit)

    first = run(place, "human", output=output, ask=ask)
    assert first.kind == "human"
    assert judgements_file(output).name == "answers.judgements.jsonl"
    assert first.pairs[0].num_unjudged > 0
    assert asked == 10
    whole = run(place, "human", output=output, ask=lambda groups, file: ask(groups, file, None)).pairs[0]
    assert whole.num_unjudged == 0
    by_score = run(place, letters).pairs[0]
    # Nobody is shown an empty answer: it loses, with whatever letters.
    assert abs(whole.win_rate.value - by_score.win_rate.value) < 0.05
    orders = [json.loads(line)["order"] for line in lines_of(judgements_file(output))]
    assert {tuple(order) for order in orders} == {(0, 1), (1, 0)}


def test_what_people_are_not_asked_about(tmp_path):
    def case(*texts: str) -> Case:
        return Case(texts[0] + texts[1], "p", "q", {}, ["x", "y"], list(texts), [False] * 2, [1] * 2)

    cases = [case("a", "b"), case("a", "a"), case("", "b"), case("b", " "), case("c", "d")]
    groups = groups_of(cases)
    assert [group.group_id for group in groups] == ["ab", "cd"]
    assert all(isinstance(group, Group) for group in groups)
    file = tmp_path / "j.jsonl"
    rows = [
        {"prompt": "q", "responses": ["b", "a"], "ranks": [1, 2], "group_id": "ab", "annotator": name}
        for name in ("eve", "bob")
    ]
    rows += [{"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1], "group_id": "ab", "annotator": "kim"}]
    write_rows(file, rows)
    np.testing.assert_allclose(judged_by_people(cases, file, 0, 1), [2.5 / 3, 0.5, 1.0, 0.0, np.nan])


# ---- best of n


def opposite(prompts: Any, completions: Any) -> list[float]:
    return [-each for each in letters(prompts, completions)]


def near(prompts: Any, completions: Any) -> list[float]:
    return [
        each + 0.1 * len(text(completion)) / 20
        for each, completion in zip(letters(prompts, completions), completions, strict=True)
    ]


def test_best_of_n_must_please_a_judge_that_does_not_know_the_reward(place, tmp_path):
    output = tmp_path / "best.jsonl"
    found = run(place, near, models=("keen",), best_of=4, rewards=[letters], output=output)
    assert found.gate is not None
    assert found.gate.passed
    assert found.gate.figures["n"] == 4
    assert found.sources[1].source == "best of 4 by letters"
    assert found.pairs[0].win_rate.value > 0.5
    assert found.pairs[0].losses <= 2
    rows = [json.loads(line) for line in lines_of(output)]
    assert len(rows) == NUM
    table = np.array([row["scores"]["letters"] for row in rows])
    assert table.shape == (NUM, 4)
    assert found.gate.figures["reward_best"] == pytest.approx(table.max(axis=1).mean())
    assert found.gate.figures["reward_mean"] == pytest.approx(table.mean())
    inverse = run(place, opposite, models=("keen",), best_of=4, rewards=[letters], output=output)
    assert inverse.gate is not None
    assert not inverse.gate.passed

    def by_pairs(prompts: Any, first: Any, second: Any) -> list[str]:
        return [
            "first"
            if text(a).count("a") > text(b).count("a")
            else "second"
            if text(a).count("a") < text(b).count("a")
            else "tie"
            for a, b in zip(first, second, strict=True)
        ]

    seen = run(place, by_pairs, models=("keen",), best_of=4, rewards=[letters], output=output)
    assert seen.gate is not None
    assert seen.gate.passed
    assert "prefers the one that letters likes best to the first in" in seen.gate.text


def test_the_gate_on_the_command_line(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = (
        "def {name}(prompts, completions):\n    return [{sign}each[0]['content'].count('a') for each in completions]\n"
    )
    (tmp_path / "r.py").write_text(
        source.format(name="more", sign="")
        + source.format(name="fewer", sign="-")
        + source.format(name="also", sign="2 * ")
    )
    arguments = [
        "compare",
        str(place / "keen"),
        "--prompts",
        str(place / "prompts.jsonl"),
        "--best-of",
        "3",
        "--reward",
        "r.py:more",
    ]
    arguments += ["--max-new-tokens", "8", "--threads", "1"]
    assert main([*arguments, "--judge", "r.py:also"]) == 0
    assert "gate      passed: Of 3 answers to each of 48 prompts" in capsys.readouterr().out
    assert main([*arguments, "--judge", "r.py:fewer", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["gate"]["passed"] is False
    assert main([*arguments, "--judge", "./r.py:more"]) == 2
    assert "is the judge and the reward" in capsys.readouterr().err


def test_the_labeller_in_the_terminal(place, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "p.jsonl"
    write_rows(prompts, [{"prompt": [{"role": "user", "content": f"{n}"}]} for n in range(3)])
    arguments = ["compare", str(place / "plain"), str(place / "keen"), "--prompts", str(prompts), "--judge", "human"]
    arguments += ["--output", str(tmp_path / "a.jsonl"), "--max-new-tokens", "6", "--threads", "1"]
    monkeypatch.setattr("sys.stdin", io.StringIO("1 2\n\nq\n"))
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 left; the same command goes on" in printed
    assert "2 not judged" in printed
    monkeypatch.setattr("sys.stdin", io.StringIO("1=2\n\n2 1\n\n"))
    assert main(arguments) == 0
    assert "not judged" not in capsys.readouterr().out
    assert "plain" not in printed.split("3 prompts")[0].replace(str(tmp_path), "").replace("plainly", "")


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (("plain",), {}, "one model alone compares with nothing"),
        (("plain", "plain"), {}, "is there twice: it would only tie with itself"),
        (("plain", "keen"), {"num_generations": 0}, "num_generations must be at least 1"),
        (("plain", "keen"), {"rewards": [letters]}, "a reward chooses the best of n answers: give --best-of too"),
        (("plain", "keen"), {"best_of": 4, "rewards": [letters]}, "give one model, not 2"),
        (("plain",), {"best_of": 1, "rewards": [letters]}, "best of 1 chooses nothing"),
        (("plain",), {"best_of": 4}, "needs a reward that chooses: give --reward"),
        (("plain",), {"best_of": 4, "rewards": [letters]}, "letters is the judge and the reward"),
        (("plain", "keen"), {"judge": "human"}, "a person's judgements must not be lost: give --output"),
        (("plain", "keen"), {"judge": "human", "output": "a.jsonl"}, "there is nobody to ask"),
        (("plain", "nowhere"), {}, "nowhere: no such folder"),
        (("plain", "keen"), {"judge": "nowhere/rm"}, "nowhere/rm: no such folder; give the folder of a reward model"),
    ],
)
def test_bad_input_is_one_clear_line(place, models, options, message):
    with pytest.raises((ConfigError, DataError, ingot.CheckpointError), match=message) as caught:
        run(place, options.pop("judge", letters), models=models, **options)
    assert "\n" not in str(caught.value)


def test_a_reward_model_is_no_writer_and_long_prompts_are_left_out(place, tmp_path):
    model = Model(load_model(place / "plain").config, num_values=1)
    encoder = ChatEncoder(ChatTemplate.of_model(place / "plain"), Tokenizer.from_file(place / "plain"))
    RewardModel(model, encoder).save(tmp_path / "rm")
    encoder.tokenizer.save(tmp_path / "rm")
    with pytest.raises(ConfigError, match="is a reward model, which scores and writes nothing"):
        run(place, letters, models=("plain", str(tmp_path / "rm")))
    long = tmp_path / "long.jsonl"
    write_rows(
        long, [{"prompt": [{"role": "user", "content": "x" * 90}]}, {"prompt": [{"role": "user", "content": "x"}]}]
    )
    found = compare_models([str(place / "plain"), str(place / "keen")], long, letters, max_new_tokens=4, threads=1)
    assert (found.num_prompts, found.num_too_long) == (1, 1)
    assert "1 prompt left out" in found.notices[0]
    assert not math.isnan(found.pairs[0].win_rate.low)
