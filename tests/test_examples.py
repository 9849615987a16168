"""Rows become packs: nothing lost, nothing cut, groups whole, targets where they belong, the same order for the same seed."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ingot
from ingot.data.chat import ChatEncoder, ChatTemplate, Encoded
from ingot.data.examples import (
    ExampleBatches,
    Examples,
    assemble_pack,
    best_fit_decreasing,
    encode_row,
    load_examples,
)
from ingot.data.rows import LanguageModelling, PromptOnly, RowError, parse_row
from ingot.errors import DataError
from ingot.tokenizer import Tokenizer

TEMPLATE = ChatTemplate.built_in()
BASE = Tokenizer.train(iter(["low lower lowest hello hello"] * 3), vocab_size=265)
TOKENIZER = BASE.with_special_tokens(TEMPLATE.missing_special_tokens(BASE))
ENCODER = ChatEncoder(TEMPLATE, TOKENIZER)
END = "<|endoftext|>"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def shown(encoded):
    """Text of a sequence with its trained part in brackets."""
    pieces = itertools.groupby(zip(encoded.ids.tolist(), encoded.mask.tolist(), strict=True), key=lambda pair: pair[1])
    texts = [(trained, TOKENIZER.decode([token for token, _ in part])) for trained, part in pieces]
    return "".join(f"[{text}]" if trained else text for trained, text in texts)


ASKED = f"{END}<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": "low"}, [f"{END}[low{END}]"]),
        ({"messages": [user("hello"), assistant("low"), user("lost")]}, [f"{ASKED}[low<|im_end|>]"]),
        ({"prompt": "hello", "completion": " low"}, [f"{END}hello[ low{END}]"]),
        ({"question": "hello", "answer": "low"}, [f"{ASKED}[low<|im_end|>]"]),
        (
            {"prompt": "hello", "chosen": "low", "rejected": "lower"},
            [f"{END}hello[low{END}]", f"{END}hello[lower{END}]"],
        ),
        ({"chosen": "hello\nyes", "rejected": "hello\nno"}, [f"{END}hello\n[yes{END}]", f"{END}hello\n[no{END}]"]),
        (
            {"chosen": [user("hello"), assistant("a")], "rejected": [user("hello"), assistant("b")]},
            [f"{ASKED}[a<|im_end|>]", f"{ASKED}[b<|im_end|>]"],
        ),
        ({"prompt": "hello", "completion": "low", "label": False}, [f"{END}hello[low{END}]"]),
        ({"prompt": "hello", "responses": list("abc"), "ranks": [1, 2, 2]}, [f"{END}hello[{x}{END}]" for x in "abc"]),
        ({"prompt": [user("hello")], "responses": list("ab")}, [f"{ASKED}[{x}<|im_end|>]" for x in "ab"]),
        ({"prompt": "2+2=", "completions": ["4", "5"], "labels": [True, False]}, [f"{END}2+2=[4\n5\n]"]),
    ],
)
def test_each_kind_of_row_has_its_sequences(columns, expected):
    assert [shown(each) for each in encode_row(parse_row(columns), ENCODER)] == expected


def test_a_sequence_is_judged_at_its_end_and_steps_at_theirs():
    [whole] = encode_row(parse_row({"question": "hello", "answer": "low"}), ENCODER)
    assert whole.ids[list(whole.ends)].tolist() == [ENCODER.end_of_turn_id]
    assert whole.ends == (len(whole) - 1,)
    row = {"prompt": "2+2=", "completions": ["4 or", "5"], "labels": [True, False]}
    [steps] = encode_row(parse_row(row), ENCODER)
    assert [TOKENIZER.decode(steps.ids[: end + 1]) for end in steps.ends] == [f"{END}2+2=4 or\n", f"{END}2+2=4 or\n5\n"]


def test_rows_that_cannot_be_encoded_are_named():
    with pytest.raises(RowError, match="is prompt-only: it holds no answer"):
        encode_row(PromptOnly(number=7, prompt="x"), ENCODER)
    template = ChatTemplate(
        "{{ raise_exception('odd roles') if messages | length > 2 }}" + TEMPLATE.source, name="strict"
    )
    strict = ChatEncoder(template, TOKENIZER)
    row = LanguageModelling(number=7, content=[user("a"), assistant("b"), user("c"), assistant("d")])
    with pytest.raises(RowError, match="row 7: cannot be encoded: strict: refuses this dialogue: odd roles"):
        encode_row(row, strict)


def test_long_rows_are_left_out_whole_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "x", "chosen": "y" * n, "rejected": "z"} for n in (3, 50, 5, 40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_examples(path, ENCODER, max_length=20)
    assert (examples.num_rows, examples.num_too_long, len(examples)) == (4, 2, 2)
    assert [row.number for row in examples.rows] == [1, 3]
    assert all(sequence.ids[-1] == TOKENIZER.eos_token_id for group in examples.groups for sequence in group)
    exact = max(len(sequence) for sequence in encode_row(parse_row(rows[3]), ENCODER))
    assert len(load_examples(path, ENCODER, max_length=exact)) == 3
    with pytest.raises(DataError, match="none of 4 rows fits into max_length 2; the shortest needs 6 tokens"):
        load_examples(path, ENCODER, max_length=2)


# ---- packs


def sequence(length, seed=0):
    random = np.random.default_rng([seed, length])
    ids = random.integers(0, 50, length).astype(np.int32)
    return Encoded(ids, random.random(length) < 0.5, (length - 1,) if length else ())


LENGTHS = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4), min_size=1, max_size=12)


@given(LENGTHS)
def test_every_token_but_the_last_of_a_sequence_has_a_target(lengths):
    groups = [[sequence(length, number) for length in group] for number, group in enumerate(lengths)]
    whole, trained = (assemble_pack(groups, prompt_targets=targets) for targets in (True, False))
    flat = [each for group in groups for each in group]
    held = [each for each in flat if len(each)]
    assert whole.num_targets == sum(map(len, flat)) - len(held)
    assert trained.num_targets == sum(int(each.mask[1:].sum()) for each in flat)
    assert np.diff(whole.offsets).tolist() == [len(each) for each in flat]
    assert np.diff(whole.group_offsets).tolist() == [len(group) for group in groups]
    assert whole.sequence_ids.tolist() == list(range(len(flat)))
    assert (whole.mask == (trained.targets >= 0)).all()
    for each, low, high in zip(flat, whole.offsets, whole.offsets[1:], strict=False):
        assert (whole.tokens[low:high] == each.ids).all()
        assert whole.targets[low:high].tolist() == [*each.ids[1:].tolist(), *([-1] if len(each) else [])]
        assert np.flatnonzero(whole.value_rows[low:high]).tolist() == list(each.ends)
    assert (np.where(whole.mask, whole.targets, -1) == trained.targets).all()


def test_empty_and_single_tokens_have_no_target():
    pack = assemble_pack([[sequence(0), sequence(1)], [sequence(0)]], prompt_targets=True)
    assert (pack.num_targets, pack.tokens.shape, pack.offsets.tolist()) == (0, (1,), [0, 0, 1, 1])
    empty = assemble_pack([])
    assert (empty.tokens.shape, empty.offsets.tolist(), empty.num_targets) == ((0,), [0], 0)


@given(st.lists(st.integers(0, 10), max_size=40), st.integers(10, 25))
def test_bins_hold_every_item_once_and_are_well_filled(lengths, capacity):
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    sizes = [sum(lengths[item] for item in each) for each in bins]
    assert all(size <= capacity for size in sizes)
    assert len(bins) == len(slow_bins(lengths, capacity))
    assert bins == slow_bins(lengths, capacity)
    # No two bins would fit into one, as then the later one would not have been opened.
    assert all(
        first + second > capacity for first, second in itertools.combinations(sizes, 2) if min(first, second) > 0
    )


def slow_bins(lengths, capacity):
    """Best fit decreasing, word for word."""
    bins = []
    for item in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        used = [sum(lengths[other] for other in each) for each in bins]
        fitting = [number for number in range(len(bins)) if used[number] + lengths[item] <= capacity]
        if fitting:
            bins[min(fitting, key=lambda number: (-used[number], number))].append(item)
        else:
            bins.append([item])
    return bins


def test_an_item_longer_than_a_bin_is_refused():
    with pytest.raises(ValueError, match="item 1 has length 11, more than a bin holds"):
        best_fit_decreasing([1, 11], 10)


def examples_of(lengths):
    groups = tuple(tuple(sequence(length, number) for length in group) for number, group in enumerate(lengths))
    rows = tuple(parse_row({"text": f"row {number}"}, number=number + 1) for number in range(len(lengths)))
    return Examples(rows, groups, len(rows), 0)


@given(LENGTHS, st.integers(1, 5), st.integers(48, 80), st.integers(0, 3))
def test_an_epoch_has_every_group_once_and_whole(lengths, batch_size, pack_length, seed):
    examples = examples_of(lengths)
    batches = ExampleBatches(examples, batch_size=batch_size, pack_length=pack_length, seed=seed)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        taken = [batches.take(step) for step in steps]
        members = [pack.members.tolist() for packs in taken for pack in packs]
        assert sorted(itertools.chain(*members)) == list(range(len(lengths)))
        for packs in taken:
            ids = sorted(itertools.chain(*(pack.sequence_ids.tolist() for pack in packs)))
            assert ids == list(range(len(ids)))
            for pack in packs:
                assert len(pack.tokens) <= pack_length
                expected = assemble_pack([examples.groups[member] for member in pack.members])
                for name in ("tokens", "offsets", "targets", "group_offsets", "value_rows"):
                    assert (getattr(pack, name) == getattr(expected, name)).all()


def test_a_step_depends_on_seed_and_step_alone():
    examples = examples_of([[5, 3]] * 40)

    def order(seed, steps):
        batches = ExampleBatches(examples, batch_size=7, pack_length=40, seed=seed)
        return {step: [pack.members.tolist() for pack in batches.take(step)] for step in steps}

    forward = order(1, range(12))
    assert order(1, [11, 3, 0]) == {step: forward[step] for step in (11, 3, 0)}
    assert order(2, range(12)) != forward
    assert forward[0] != forward[6]


def test_a_sequence_keeps_its_number_however_its_step_is_packed():
    examples = examples_of([[3, 4], [9], [2, 2, 2], [7], [1]])
    numbers = []
    for pack_length in (12, 30):
        found = {}
        for pack in ExampleBatches(examples, batch_size=5, pack_length=pack_length, seed=4).take(0):
            for member, low, high in zip(pack.members, pack.group_offsets, pack.group_offsets[1:], strict=False):
                found[int(member)] = pack.sequence_ids[low:high].tolist()
        numbers.append(found)
    assert numbers[0] == numbers[1]


def test_what_cannot_be_batched_is_named():
    with pytest.raises(DataError, match="the 2 sequences of row 2 have 20 tokens together, more than a pack of 15"):
        ExampleBatches(examples_of([[5, 5], [10, 10]]), batch_size=1, pack_length=15, seed=0)
    with pytest.raises(DataError, match="no example to train on"):
        ExampleBatches(examples_of([]), batch_size=1, pack_length=15, seed=0)


def test_held_out_rows_are_chosen_by_their_prompt():
    rows = tuple(
        parse_row({"prompt": f"p{number % 300}", "chosen": f"a{number}", "rejected": "b"}, number=number + 1)
        for number in range(900)
    )
    examples = Examples(rows, tuple((sequence(3),) for _ in rows), 900, 0)
    train, held_out = examples.split(0.2)
    sides = [{row.prompt for row in side.rows} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(train) + len(held_out) == 900
    assert 30 <= len(sides[1]) <= 90
    again, _ = examples.select(range(0, 900, 2)).split(0.2)
    assert {row.prompt for row in again.rows} <= sides[0]
    assert len(examples.split(0.0)[0]) == 900
    with pytest.raises(DataError, match="2 rows with 1 different prompts are too few"):
        examples.select([0, 300]).split(0.5)


def test_the_core_takes_packs_and_neighbours_do_not_matter():
    model = ingot.Model(ingot.ModelConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    groups = [[sequence(7), sequence(1)], [sequence(0), sequence(12)]]
    pack = assemble_pack(groups, prompt_targets=True)
    alone = assemble_pack(groups[:1], prompt_targets=True)
    both, first = (
        model.forward(each.tokens, each.offsets, each.targets, sequence_ids=each.sequence_ids, train=False)[1].logprobs
        for each in (pack, alone)
    )
    assert (both[: len(first)] == first).all()
    assert np.flatnonzero(both).tolist() == np.flatnonzero(pack.targets >= 0).tolist()
