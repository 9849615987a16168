"""The example of reward functions: what they give to answers as models write them, and that a run takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ingot.configs import GRPOConfig
from ingot.training.grpo import grpo
from ingot.training.rewards import RewardFunctions, load_reward
from killable_sft import write_base

FILE = Path(__file__).parent.parent / "docs" / "examples" / "gsm8k_reward.py"
WANTED = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 1,072"


@pytest.mark.parametrize(
    ("answer", "well_formed", "number", "right"),
    [
        (WANTED, 1, 1, 1),
        ("So 1000 + 72.\n#### 1072", 1, 1, 1),
        ("So it is that.\n#### $1,072.00", 1, 1, 1),
        ("So it is that.\n#### 1072.", 1, 1, 1),
        ("So it is that.\n#### -3", 1, 1, 0),
        ("So it is that.\n#### seven", 1, 0, 0),
        ("So it is that.\n####", 1, 0, 0),
        ("#### 1072", 0, 1, 1),
        ("So it is that. #### 1072", 0, 1, 1),
        ("So.\n#### 1\n#### 1072", 0, 1, 1),
        ("So.\n#### 1072\nOr is it?", 0, 0, 0),
        ("So.\n#### 10 72", 1, 0, 0),
        ("So.\n#### \u0661", 1, 0, 0),
        ("1072", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_what_answers_are_worth(answer, well_formed, number, right):
    names = ("well_formed", "number", "right", "score")
    each = [load_reward(f"{FILE}:{name}") for name in names]
    for given, wanted in ((answer, WANTED), *[([{"role": "assistant", "content": t}] for t in (answer, WANTED))]):
        found = [function(prompts=["?"], completions=[given], completion=[wanted]) for function in each]
        assert found == [[well_formed], [number], [right], [0.5 * well_formed + 0.5 * number + right]]


def test_rows_with_question_and_answer_are_prompts_and_their_answers_a_column(tmp_path):
    """A model without chat takes texts; the column with the answer has the form that the row gives it."""
    rewards = RewardFunctions([f"{FILE}:{name}" for name in ("well_formed", "number", "right")], [0.5, 0.5, 1.0])
    found = rewards(["a", "b"], ["x\n#### 4", "#### 5"], {"completion": ["#### 4", "#### 4"]})
    assert found.total.tolist() == [2.0, 0.5]
    write_base(tmp_path / "base")
    rows = [{"prompt": f"{n}+1?", "completion": f"so\n#### {n + 1}"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = GRPOConfig(
        model=str(tmp_path / "base"),
        prompts=(str(tmp_path / "rows.jsonl"),),
        reward=tuple(f"{FILE}:{name}" for name in ("well_formed", "number", "right")),
        reward_weights=(0.5, 0.5, 1.0),
        output=str(tmp_path / "run"),
        per_device_train_batch_size=16,
        max_completion_length=4,
        max_steps=1,
        held_out=0.2,
        threads=1,
    )
    line = next(line for line in grpo(config, quiet=True).history if "loss" in line)
    assert {"rewards/well_formed/mean", "rewards/number/mean", "rewards/right/pass@8"} <= line.keys()
