"""Rewards for GSM8K: an answer ends with a line "#### NUMBER", and the number can be compared with that of the row.

    ingot grpo --model runs/sft --prompts gsm8k-train.jsonl --output runs/grpo \
        --reward ./gsm8k_reward.py:well_formed --reward ./gsm8k_reward.py:number --reward ./gsm8k_reward.py:right \
        --reward-weights 0.5 0.5 1

The first two are steps on the way: a model that never writes the line would otherwise never be told which of its answers is better.
"""

import re
from decimal import Decimal, InvalidOperation

MARK = "####"


def well_formed(prompts, completions, **columns):
    """1 where the mark stands once, at the beginning of the last line, after some reasoning."""
    return [float(_is_well_formed(_text(completion))) for completion in completions]


def number(prompts, completions, **columns):
    """1 where what follows the mark is a number."""
    return [float(_number(_text(completion)) is not None) for completion in completions]


def right(prompts, completions, completion, **columns):
    """1 where that number is the one of the row's own answer."""
    return [
        float(_number(_text(given)) is not None and _number(_text(given)) == _number(_text(wanted)))
        for given, wanted in zip(completions, completion, strict=True)
    ]


def score(prompts, completions, completion, **columns):
    """All three in one, at most 2."""
    parts = (well_formed(prompts, completions), number(prompts, completions), right(prompts, completions, completion))
    return [0.5 * form + 0.5 * there + same for form, there, same in zip(*parts, strict=True)]


def _text(completion):
    """Of an answer: text, or messages where the data are dialogues."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def _is_well_formed(text):
    lines = text.strip().split("\n")
    return text.count(MARK) == 1 and lines[-1].startswith(MARK) and len(lines) > 1


def _number(text):
    """What follows the last mark, without thousands separators, dollar signs and a full stop; None where it is no number."""
    if MARK not in text:
        return None
    found = text.rpartition(MARK)[2].strip().replace(",", "").replace("$", "").removesuffix(".")
    if not re.fullmatch(r"-?\d+(\.\d+)?", found, re.ASCII):
        return None
    try:
        return Decimal(found)
    except InvalidOperation:
        return None
