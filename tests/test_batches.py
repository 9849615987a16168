"""Order, packing, windows and the held-out split: nothing is lost, mixed or repeated, and a cursor continues exactly."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.data.batches import (
    Cursor,
    Order,
    PackedBatches,
    RandomBatches,
    Stretches,
    assemble,
    held_out_batches,
    make_batches,
    split,
)
from ingot.data.corpus import Corpus
from ingot.data.shards import TokenShards
from ingot.errors import DataError
from test_shards import ByteTokenizer


def stretches_of(lengths: list[int]) -> tuple[np.ndarray, Stretches]:
    """Ids that are all different, and stretches of these lengths side by side."""
    bounds = np.cumsum([0, *lengths]).astype(np.int64)
    return np.arange(bounds[-1]), Stretches.of(bounds[:-1], bounds[1:])


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_the_order_is_a_permutation(n, seed, epoch):
    assert sorted(Order(n, seed, epoch)[i] for i in range(n)) == list(range(n))


def test_orders_differ_between_seeds_and_epochs_and_spread_evenly():
    orders = {tuple(Order(50, seed, epoch)[i] for i in range(50)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
    # Where element 0 goes, over 6000 seeds: chi-squared with 9 degrees of freedom, far below its 1e-6 quantile (47).
    counts = collections.Counter(Order(10, seed, 0)[0] for seed in range(6000))
    assert sum((counts[i] - 600) ** 2 / 600 for i in range(10)) < 47
    with pytest.raises(IndexError):
        Order(10, 0, 0)[10]


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=30).filter(lambda values: sum(values) > 40)


@given(lengths, st.integers(2, 12), st.integers(1, 6), st.integers(0, 99))
def test_packing_uses_each_target_once_an_epoch_and_mixes_no_documents(sizes, max_length, rows, seed):
    ids, stretches = stretches_of(sizes)
    document = np.repeat(np.arange(len(sizes)), sizes)
    batches = PackedBatches(ids, stretches, max_length, rows, seed)
    cursor = Cursor()
    seen: collections.Counter[tuple[int, int]] = collections.Counter()
    epochs = 2
    while cursor.epoch < epochs:
        before = cursor
        batch, cursor = batches.take(0, cursor)
        assert cursor != before
        assert len(batch.rows) == rows + 1
        for row in range(rows):
            begin, end = batch.rows[row], batch.rows[row + 1]
            assert batch.offsets[end] - batch.offsets[begin] <= max_length
        for low, high in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
            tokens, targets = batch.tokens[low:high], batch.targets[low:high]
            assert len(tokens) > 0
            assert (targets == tokens + 1).all()
            assert len(set(document[tokens]) | set(document[targets])) == 1
            whole = sizes[document[tokens[0]]] - 1
            if whole <= max_length:
                assert len(tokens) == whole, "a document that fits in a row was cut"
            seen.update(zip(tokens.tolist(), targets.tolist(), strict=True))
    complete = [
        (int(t), int(t) + 1) for a, b in zip(stretches.starts, stretches.stops, strict=True) for t in range(a, b - 1)
    ]
    counts = {seen[pair] for pair in complete}
    # The last step may run into the next epoch.
    assert min(counts) == epochs
    assert set(seen) == set(complete)


@given(lengths, st.integers(2, 12), st.integers(1, 4), st.integers(0, 99), st.integers(1, 10))
def test_a_cursor_continues_exactly(sizes, max_length, rows, seed, cut):
    ids, stretches = stretches_of(sizes)
    straight = PackedBatches(ids, stretches, max_length, rows, seed)
    cursor = Cursor()
    expected = []
    for step in range(cut + 5):
        batch, cursor = straight.take(step, cursor)
        expected.append(batch)
        if step == cut - 1:
            saved = (cursor.epoch, cursor.index, cursor.carry)
    resumed = PackedBatches(ids, stretches, max_length, rows, seed)
    cursor = Cursor(*saved)
    for step in range(cut, cut + 5):
        batch, cursor = resumed.take(step, cursor)
        for name in ("tokens", "targets", "offsets", "rows", "sequence_ids"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(expected[step], name))


def test_rows_are_well_filled():
    sizes = np.random.default_rng(0).integers(20, 200, 4000).tolist()
    ids, stretches = stretches_of(sizes)
    batches = PackedBatches(ids, stretches, 256, 16, 0)
    assert stretches.num_targets / (batches.steps_per_epoch() * 16 * 256) > 0.85


def test_long_documents_are_cut_elsewhere_in_each_epoch():
    ids, stretches = stretches_of([1000])
    batches = PackedBatches(ids, stretches, 16, 4, 0)
    firsts = []
    for epoch in range(6):
        batch, _ = batches.take(0, Cursor(epoch, 0, 0))
        assert batch.tokens[0] == 0
        firsts.append(int(batch.offsets[1]))
    assert len(set(firsts)) > 3


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    ids, stretches = stretches_of([3] * 40)

    def order(seed, epoch):
        batch, _ = PackedBatches(ids, stretches, 2, 40, seed).take(0, Cursor(epoch, 0, 0))
        return tuple(batch.tokens[batch.offsets[:-1]].tolist())

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(one) == list(range(0, 120, 3)) for one in orders)


def test_the_given_order_is_kept_in_every_epoch():
    sizes = [3, 9, 2, 17, 5, 8]
    ids, stretches = stretches_of(sizes)
    batches = PackedBatches(ids, stretches, 16, 1, 0, shuffle=False)
    cursor, met = Cursor(), []
    while cursor.epoch < 2:
        batch, cursor = batches.take(0, cursor)
        met += batch.tokens[batch.offsets[:-1]].tolist()
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    assert met[: 2 * len(sizes)] == starts + starts


def test_steps_per_epoch_is_what_an_epoch_takes():
    ids, stretches = stretches_of([5, 9, 30, 2, 17, 8, 8, 21])
    batches = PackedBatches(ids, stretches, 8, 3, 1)
    cursor, steps = Cursor(), 0
    while cursor.epoch == 0:
        _, cursor = batches.take(steps, cursor)
        steps += 1
    assert steps - 1 <= batches.steps_per_epoch() <= steps


@pytest.mark.parametrize("windows", ["packed", "random"])
def test_parts_of_a_step_are_its_rows_however_it_is_divided(tmp_path, windows):
    documents = [bytes(range(3 + i % 20)) for i in range(200)] + [bytes(range(256)) * 4]
    shards = TokenShards.build(Corpus(documents), ByteTokenizer(), tmp_path)
    divided = split(shards, 0.1)
    batches = make_batches(shards, divided.train, windows=windows, max_length=16, rows=8, seed=3)
    batch, _ = batches.take(5, Cursor())
    for parts in (1, 2, 4, 8):
        pieces = batch.split(parts)
        np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in pieces]), batch.tokens)
        np.testing.assert_array_equal(np.concatenate([piece.targets for piece in pieces]), batch.targets)
        np.testing.assert_array_equal(np.concatenate([piece.sequence_ids for piece in pieces]), batch.sequence_ids)
        lengths = np.concatenate([np.diff(piece.offsets) for piece in pieces])
        np.testing.assert_array_equal(lengths, np.diff(batch.offsets))
        for piece in pieces:
            assert piece.offsets[0] == piece.rows[0] == 0
            assert piece.offsets[-1] == len(piece.tokens) <= 16 * 8 // parts
    with pytest.raises(ValueError, match="do not divide"):
        batch.split(3)


def test_random_windows_depend_on_seed_step_and_row_alone():
    ids, stretches = stretches_of([500, 9, 300])
    batches = RandomBatches(ids, stretches, 16, 8, 7)
    batch, cursor = batches.take(1000, Cursor())
    assert cursor == Cursor()
    again, _ = RandomBatches(ids, stretches, 16, 8, 7).take(1000, Cursor())
    np.testing.assert_array_equal(batch.tokens, again.tokens)
    fewer, _ = RandomBatches(ids, stretches, 16, 2, 7).take(1000, Cursor())
    np.testing.assert_array_equal(fewer.tokens, batch.tokens[:32])
    for other in (batches.take(1001, Cursor())[0], RandomBatches(ids, stretches, 16, 8, 8).take(1000, Cursor())[0]):
        assert (other.tokens != batch.tokens).any()


def test_random_windows_begin_everywhere_and_cross_no_boundary():
    sizes = [40, 5, 30]
    ids, stretches = stretches_of(sizes)
    document = np.repeat(np.arange(3), sizes)
    batches = RandomBatches(ids, stretches, 8, 64, 0)
    starts: collections.Counter[int] = collections.Counter()
    for step in range(100):
        batch, _ = batches.take(step, Cursor())
        windows = batch.tokens.reshape(64, 8)
        assert (np.diff(windows) == 1).all()
        assert (batch.targets == batch.tokens + 1).all()
        assert (document[windows[:, :1]] == document[batch.targets.reshape(64, 8)]).all()
        starts.update(windows[:, 0].tolist())
    # Documents of 40 and 30 have 32 and 22 places for a window with its targets; the one of 5 has none.
    assert set(starts) == {*range(32), *range(45, 67)}
    expected = 6400 / 54
    assert sum((count - expected) ** 2 / expected for count in starts.values()) < 53 + 6 * (2 * 53) ** 0.5


def test_text_shorter_than_a_window_is_refused(tmp_path):
    shards = TokenShards.build(Corpus([b"twenty bytes of text"]), ByteTokenizer(), tmp_path)
    for windows in ("packed", "random"):
        with pytest.raises(DataError, match="20 tokens, fewer than one window of max_length 32"):
            make_batches(shards, split(shards, 0.0).train, windows=windows, max_length=32, rows=1, seed=0)
    many = TokenShards.build(Corpus([b"abcd"] * 50), ByteTokenizer(), tmp_path)
    with pytest.raises(DataError, match="no document is as long as a window"):
        make_batches(many, split(many, 0.0).train, windows="random", max_length=8, rows=1, seed=0)
    with pytest.raises(DataError, match="windows anywhere in one text have no order: leave --document-order out"):
        make_batches(many, split(many, 0.0).train, windows="random", max_length=2, rows=1, seed=0, shuffle=False)


def test_one_long_text_is_held_out_by_position(tmp_path):
    shards = TokenShards.build(Corpus([bytes(1000)]), ByteTokenizer(), tmp_path)
    divided = split(shards, 0.1)
    assert (divided.train.starts.tolist(), divided.train.stops.tolist()) == ([0], [900])
    assert (divided.held_out.starts.tolist(), divided.held_out.stops.tolist()) == ([900], [1000])
    assert divided.rule == "the last 10 % of the text is held out"


def test_few_documents_give_the_end_of_each(tmp_path):
    shards = TokenShards.build(Corpus([bytes(1000), bytes(100)]), ByteTokenizer(end=256, vocab_size=257), tmp_path)
    divided = split(shards, 0.2)
    # 1 + 1000 + 1 ids with both boundaries; the boundary between two documents belongs to both.
    assert divided.train.starts.tolist() == [0, 1001]
    assert divided.train.stops.tolist() == [801, 1082]
    assert divided.held_out.stops.tolist() == [1002, 1103]


def test_many_documents_are_held_out_by_their_content(tmp_path):
    documents = [f"document {i}".encode() * 3 for i in range(2000)]
    tokenizer = ByteTokenizer(end=256, vocab_size=257)
    shards = TokenShards.build(Corpus(documents), tokenizer, tmp_path)
    divided = split(shards, 0.1)
    assert 140 < len(divided.held_out) < 260

    def texts(shards, stretches):
        return {
            bytes(shards.ids[a + 1 : b - 1].astype(np.uint8))
            for a, b in zip(stretches.starts, stretches.stops, strict=True)
        }

    held = texts(shards, divided.held_out)
    assert held | texts(shards, divided.train) == set(documents)
    assert not held & texts(shards, divided.train)
    # Other documents come and go, copies appear: each keeps its side.
    other = TokenShards.build(Corpus(documents[500:] + documents[:1000]), tokenizer, tmp_path)
    again = split(other, 0.1)
    assert texts(other, again.held_out) == held
    assert not texts(other, again.held_out) & texts(other, again.train)


def test_one_huge_document_among_many_is_not_held_out_whole(tmp_path):
    for salt in range(20):
        documents = [f"small {i}".encode() for i in range(60)] + [f"huge {salt} ".encode() * 1000]
        shards = TokenShards.build(Corpus(documents), ByteTokenizer(), tmp_path)
        divided = split(shards, 0.1)
        total = divided.train.num_targets + divided.held_out.num_targets
        assert divided.held_out.num_targets / total < 0.31


def test_a_text_too_short_to_divide_is_refused(tmp_path):
    shards = TokenShards.build(Corpus([b"abcd"]), ByteTokenizer(), tmp_path)
    with pytest.raises(DataError, match="only 4 tokens, too few to hold 10 % out"):
        split(shards, 0.1)


@given(lengths, st.integers(1, 12), st.integers(1, 4))
def test_the_held_out_part_is_measured_whole_in_consecutive_windows(sizes, max_length, rows):
    ids, stretches = stretches_of(sizes)
    seen = []
    for batch in held_out_batches(ids, stretches, max_length=max_length, rows=rows):
        assert batch.num_targets <= (rows + 1) * max_length
        assert (batch.targets == batch.tokens + 1).all()
        for low, high in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
            assert 0 < high - low <= max_length
            first = batch.tokens[low]
            start = stretches.starts[np.searchsorted(stretches.starts, first, side="right") - 1]
            assert (first - start) % max_length == 0
        seen += batch.tokens.tolist()
    expected = [t for a, b in zip(stretches.starts, stretches.stops, strict=True) for t in range(a, b - 1)]
    assert seen == expected


def test_a_limit_takes_batches_from_all_over():
    ids, stretches = stretches_of([10_000])
    whole = list(held_out_batches(ids, stretches, max_length=10, rows=10))
    some = list(held_out_batches(ids, stretches, max_length=10, rows=10, limit=5))
    assert len(whole) == 100
    assert [int(batch.tokens[0]) for batch in some] == [0, 2000, 4000, 6000, 8000]
    assert len(list(held_out_batches(ids, stretches, max_length=10, rows=10, limit=1000))) == 100


def test_assembled_types():
    batch = assemble(np.arange(10, dtype=np.uint16), [[(0, 2)], [], [(4, 3), (8, 1)]])
    assert batch.tokens.tolist() == [0, 1, 4, 5, 6, 8]
    assert batch.targets.tolist() == [1, 2, 5, 6, 7, 9]
    assert batch.offsets.tolist() == [0, 2, 5, 6]
    assert batch.rows.tolist() == [0, 1, 1, 3]
    assert [a.dtype for a in (batch.tokens, batch.targets, batch.offsets, batch.sequence_ids)] == [
        np.int32,
        np.int32,
        np.int64,
        np.int64,
    ]
    assert [len(part.tokens) for part in batch.split(3)] == [2, 4]
