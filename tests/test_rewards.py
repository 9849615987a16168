"""Reward functions: the convention, how they are found, and one clear line for all that they can do wrong."""

from __future__ import annotations

import math
import sys
import threading
import time

import numpy as np
import pytest

from ingot.errors import ConfigError
from ingot.training.rewards import RewardError, RewardFunctions, completion_like, load_reward

PROMPTS, COMPLETIONS = ["a", "b", "c"], ["x", "xx", "xxx"]


def length(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def reward(function, **options):
    return RewardFunctions([function], **options)(PROMPTS, COMPLETIONS)


def message(function, **options):
    with pytest.raises(RewardError) as error:
        reward(function, **options)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("reward ")
    return str(error.value)


def test_one_number_for_each_completion():
    got = reward(length)
    assert got.total.tolist() == [1, 2, 3]
    assert got.names == ("length",)
    assert got.metrics() == {"rewards/length/mean": 2.0, "rewards/length/std": 1.0}


@pytest.mark.parametrize(
    "values",
    [np.array([1, 0, 1], np.int64), (True, False, True), [np.float32(1), 0, 1.0], np.array([1, 0, 1], bool)],
)
def test_what_counts_as_a_number(values):
    assert reward(lambda prompts, completions: values).total.tolist() == [1, 0, 1]


def test_torch_generators_and_coroutines():
    import torch

    assert reward(lambda prompts, completions: torch.tensor([1.0, 2, 3])).total.tolist() == [1, 2, 3]

    def each(prompts, completions):
        yield from (1, 2, 3)

    async def later(prompts, completions):
        return [1, 2, 3]

    assert reward(each).total.tolist() == [1, 2, 3]
    assert reward(later).total.tolist() == [1, 2, 3]
    assert reward(later, timeout_s=None).total.tolist() == [1, 2, 3]


def test_columns_go_to_those_who_take_them():
    seen = {}

    def everything(prompts, completions, **columns):
        seen.update(columns)
        return [0] * len(prompts)

    def named(completions, answer):
        return [float(a == c) for a, c in zip(answer, completions, strict=True)]

    columns = {"answer": ["x", "y", "xxx"], "id": [1, 2, 3]}
    got = RewardFunctions([everything, named], [1, 2])(PROMPTS, COMPLETIONS, columns)
    assert seen == columns
    assert got.total.tolist() == [2, 0, 2]
    with pytest.raises(
        RewardError, match=r"takes 'answer', which the prompts have no column for \(columns there: id\)"
    ):
        RewardFunctions([named])(PROMPTS, COMPLETIONS, {"id": [1, 2, 3]})


def test_messages_are_passed_as_they_are():
    prompt = [{"role": "user", "content": "hi"}]
    answer = completion_like(prompt, "hello")
    assert answer == [{"role": "assistant", "content": "hello"}]
    assert completion_like("hi", "hello") == "hello"
    got = RewardFunctions([lambda prompts, completions: [len(completions[0][0]["content"]) + len(prompts[0])]])
    assert got([prompt], [answer]).total.tolist() == [6]


def test_none_is_left_out_of_the_sum_as_trl_does():
    import torch

    values = np.array([[1.0, None, None], [2.0, 3.0, None], [None, -1.0, 0.5]])
    columns = values.T.tolist()
    weights = [0.5, 2.0, -1.0]
    got = RewardFunctions([lambda prompts, completions, c=c: c for c in columns], weights)(PROMPTS, COMPLETIONS)
    table = torch.tensor([[math.nan if v is None else v for v in row] for row in values], dtype=torch.float64)
    expected = (table * torch.tensor(weights, dtype=torch.float64)).nansum(dim=1)
    expected[table.isnan().all(dim=1)] = math.nan
    assert got.total.tolist() == expected.tolist() == [0.5, 7.0, -2.5]
    nothing = reward(lambda prompts, completions: [None, 1, None])
    assert np.isnan(nothing.total).tolist() == [True, False, True]
    assert nothing.metrics()["rewards/<lambda>/mean"] == 1
    assert nothing.metrics()["rewards/<lambda>/std"] == 0


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "returned nothing"),
        ([1, 2], "returned 2 rewards for 3 completions"),
        ([1, 2, 3, 4], "returned 4 rewards for 3 completions"),
        (np.float64(3), "returned a float64, not a list"),
        (np.array(3.0), "returned one number, not a list"),
        ("123", "returned a str, not a list"),
        ({0: 1, 1: 1, 2: 1}, "returned a dict, not a list"),
        ([1, math.nan, 3], "returned nan for completion 1, 'xx'; return a finite number, or None"),
        ([1, 2, -math.inf], "returned -inf for completion 2, 'xxx'"),
        ([1, "2", 3], "returned '2' (a str) for completion 1"),
        ([[1], 2, 3], "returned [1] (a list) for completion 0"),
        ([1, 1j, 3], "returned 1j (a complex) for completion 1"),
    ],
)
def test_wrong_results_are_named(returned, words):
    assert words in message(lambda prompts, completions: returned)


def test_what_a_function_raises_is_one_line_with_its_place(tmp_path):
    (tmp_path / "r.py").write_text("def score(prompts, completions):\n    return [1 / 0]\n")
    name = f"{tmp_path}/r.py:score"
    for timeout in (5, None):
        text = message(name, timeout_s=timeout)
        assert text == f"reward {name}: raised ZeroDivisionError: division by zero (r.py, line 2)"

    def leave(prompts, completions):
        raise SystemExit("a\nb")

    assert "raised SystemExit: a b (test_rewards.py, line " in message(leave)


def test_a_slow_function_is_left_behind():
    release = threading.Event()
    start = time.monotonic()
    text = message(lambda prompts, completions: release.wait(60), timeout_s=0.05)
    assert time.monotonic() - start < 5
    assert "took longer than 0.05 s for 3 completions" in text
    # The caller can go on meanwhile, and what it saves is whole.
    assert reward(length).total.tolist() == [1, 2, 3]
    release.set()


def test_a_file_a_module_and_what_lies_beside_it(tmp_path, monkeypatch):
    (tmp_path / "helper_for_reward.py").write_text("FACTOR = 3\n")
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom helper_for_reward import FACTOR\n"
        "@dataclasses.dataclass\nclass Box:\n    size: 'int' = FACTOR\n"
        "def score(completions, **columns):\n    return [Box().size * len(c) for c in completions]\n"
        "class Group:\n    @staticmethod\n    def inner(completions, **_):\n        return [0.0] * len(completions)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere", *sys.path])
    for name in ("./mine.py:score", "mine.py:score", str(tmp_path / "mine.py") + ":score", "mine.score", "mine:score"):
        assert reward(name).total.tolist() == [3, 6, 9], name
    assert reward("mine.py:Group.inner").total.tolist() == [0, 0, 0]
    assert reward("mine.py:score").names == ("score",)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./gone.py:score", "reward ./gone.py:score: ./gone.py: no such file"),
        ("./mine.py", "names no function; write ./mine.py:FUNCTION"),
        ("./mine.py:scor", "has no 'scor'; did you mean 'score'?"),
        ("./mine.py:zzzzzz", "functions there: score"),
        ("./mine.py:number", "number is a int, not a function"),
        ("./broken.py:score", "./broken.py cannot be imported: SyntaxError: "),
        ("./raises.py:score", "./raises.py cannot be imported: ValueError: no (raises.py, line 1)"),
        ("no_such_module.score", "there is no module no_such_module"),
        ("score", "is no function; write ./file.py:FUNCTION"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch, name, words):
    (tmp_path / "mine.py").write_text("def score(prompts, completions):\n    return []\nnumber = 3\n")
    (tmp_path / "broken.py").write_text("def score(:\n")
    (tmp_path / "raises.py").write_text("raise ValueError('no')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(ConfigError) as error:
        load_reward(name)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_two_functions_of_one_name_have_different_names_in_metrics(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("def score(completions):\n    return [1] * len(completions)\n")
    files = [f"{tmp_path / name}.py:score" for name in ("a", "b", "a")]
    functions = RewardFunctions([*files, length])
    assert functions.names == ("a.score", "b.score", "a.score_2", "length")
    assert functions(PROMPTS, COMPLETIONS).total.tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), "no reward was given"),
        (([length], [1, 2]), "reward_weights has 2 numbers for 1 rewards"),
        (([length], [math.nan]), "reward_weights holds nan"),
    ],
)
def test_settings_that_do_not_fit(arguments, words):
    with pytest.raises(ConfigError, match=words):
        RewardFunctions(*arguments)
    with pytest.raises(ConfigError, match="timeout"):
        RewardFunctions([length], timeout_s=0)


def test_no_completion_calls_nothing():
    got = RewardFunctions([lambda prompts, completions: 1 / 0])([], [])
    assert got.total.shape == (0,)
    assert got.each.shape == (0, 1)
