"""The reference model: the policy's weights as they were, in the same memory until somebody writes."""

from __future__ import annotations

import gc
import multiprocessing
from pathlib import Path

import numpy as np
import psutil
import pytest

import ingot
import networks
from ingot.configs import ModelConfig
from ingot.models.base import Model
from ingot.models.native import NativeModel
from ingot.models.reference import reference_of

LLAMA = networks.SHAPES["llama"]
LENGTHS = [4, 7, 1, 3]


def make(backend: str, level: str | None = None, config: ModelConfig = LLAMA) -> Model:
    if backend == "torch":
        return ingot.Model(config, seed=3, backend="torch", device="cpu", num_values=1)
    return ingot.Model(config, seed=3, level=level, num_values=1)


def outputs_of(model: Model) -> bytes:
    tokens, offsets, targets = networks.pack(model.config, LENGTHS).arrays
    _, out = model.forward(tokens, offsets, targets, want=("logprobs", "values"), train=False)
    return out.logprobs.tobytes() + out.values.tobytes()


def learn(model: Model, steps: int) -> None:
    tokens, offsets, targets = networks.pack(model.config, LENGTHS).arrays
    for _ in range(steps):
        model.zero_grad()
        model.forward_backward(tokens, offsets, targets, np.full(len(tokens), 0.1, np.float32))
        assert not model.step(1e-2).skipped


def address(model: Model) -> int:
    """Where the weights lie."""
    if isinstance(model, NativeModel):
        return next(iter(model._core.snapshot().values())).ctypes.data
    return model._own_set.flat.data_ptr()  # type: ignore[attr-defined, no-any-return]


def check_training_leaves_the_reference(policy: Model) -> None:
    reference = reference_of(policy)
    assert address(reference) == address(policy)
    before = outputs_of(reference)
    assert before == outputs_of(policy)
    learn(policy, 10)
    assert outputs_of(reference) == before
    assert outputs_of(policy) != before
    assert address(reference) != address(policy)


def test_ten_steps_of_the_policy_leave_the_references_bits(level: str) -> None:
    check_training_leaves_the_reference(make("native", level))


def test_ten_steps_leave_the_reference_on_torch() -> None:
    check_training_leaves_the_reference(make("torch"))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_either_may_be_written_first(backend: str) -> None:
    first = make(backend)
    second = first.fork()
    third = second.fork()
    before = outputs_of(first)
    second.load_state({name: array + np.float32(0.5) for name, array in second.state().items()})
    assert outputs_of(first) == outputs_of(third) == before != outputs_of(second)
    assert address(first) == address(third)
    learn(third, 1)
    assert outputs_of(first) == before != outputs_of(third)
    # The last one that is left has the memory to itself.
    place = address(first)
    learn(first, 1)
    assert address(first) == place


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_fork_trains_as_the_model_would(backend: str) -> None:
    model, fork = make(backend), make(backend).fork()
    learn(model, 3)
    learn(fork, 3)
    assert outputs_of(model) == outputs_of(fork)
    np.testing.assert_array_equal(model.gradients["score.weight"], fork.gradients["score.weight"])


def test_writes_through_views_reach_their_own_model_alone() -> None:
    policy = make("native")
    held = policy.parameters["model.norm.weight"]
    reference = reference_of(policy)  # while a view is held: a copy at once
    assert address(reference) != address(policy)
    before = outputs_of(reference)
    held[...] = 2.0
    assert outputs_of(reference) == before != outputs_of(policy)

    del held
    gc.collect()
    reference = reference_of(policy)
    assert address(reference) == address(policy)
    before = outputs_of(reference)
    late = policy.parameters["model.norm.weight"]  # asked for afterwards: the policy moves
    assert address(reference) != address(policy)
    late[...] = 3.0
    assert outputs_of(reference) == before != outputs_of(policy)
    changed = outputs_of(policy)
    reference.parameters["model.norm.weight"][...] = 4.0
    assert outputs_of(policy) == changed


def test_views_stay_those_of_the_weights_in_use() -> None:
    policy = make("native")
    view = policy.parameters["model.norm.weight"]
    reference = reference_of(policy)
    learn(policy, 1)
    np.testing.assert_array_equal(view, policy.state()["model.norm.weight"])
    np.testing.assert_array_equal(np.ones_like(view), reference.state()["model.norm.weight"])
    assert (view != 1.0).any()


def test_reading_keeps_the_memory_shared(tmp_path: Path) -> None:
    policy = make("native")
    reference = reference_of(policy)
    policy.state()
    reference.save(tmp_path / "model")
    policy.save(tmp_path / "model2")
    assert address(reference) == address(policy)
    assert isinstance(policy, NativeModel)
    snapshot = policy._core.snapshot()
    assert not any(view.flags.writeable for view in snapshot.values())
    before = {name: view.copy() for name, view in snapshot.items()}
    learn(policy, 1)
    for name, view in snapshot.items():
        np.testing.assert_array_equal(view, before[name])


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_contexts_and_decoders_of_the_one_outlive_writes_to_the_other(backend: str) -> None:
    policy = make(backend)
    other = policy.fork()
    tokens, offsets, targets = networks.pack(policy.config, LENGTHS).arrays
    contexts = [other.forward(tokens, offsets, targets)[0] for _ in range(2)]
    assert None not in contexts
    d_logprobs = np.ones(len(tokens), np.float32)
    other.backward(contexts[0], d_logprobs=d_logprobs)  # type: ignore[arg-type]
    expected = {name: np.array(array) for name, array in other.gradients.items()}
    decoder = other.decoder(8, 1)
    decoder.add([1, 2], 0)
    learn(policy, 1)
    other.zero_grad()
    other.backward(contexts[1], d_logprobs=d_logprobs)  # type: ignore[arg-type]
    for name, array in other.gradients.items():
        np.testing.assert_array_equal(array, expected[name])
    decoder.step()
    context, _ = policy.forward(tokens, offsets, targets)
    with pytest.raises(RuntimeError, match="another model"):
        other.backward(context, d_logprobs=d_logprobs)  # type: ignore[arg-type]


def test_the_reference_costs_no_memory_before_the_first_step() -> None:
    # In a process of its own: here, what other tests have freed is used again, and nothing is seen to grow.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        shared, copied = pool.apply(growth_with_a_reference)
    assert shared < 0.05
    assert 0.9 < copied < 1.1


def growth_with_a_reference() -> tuple[float, float]:
    """Of the resident memory, as shares of the weights: after a reference was made and used, and after the policy's next step."""
    config = ModelConfig.llama(
        vocab_size=30_000, hidden_size=512, num_hidden_layers=1, num_attention_heads=8, tie_word_embeddings=False
    )
    policy = ingot.Model(config, threads=1)
    weights = 4 * policy.num_parameters
    learn(policy, 1)
    outputs = outputs_without_values(policy)
    process = psutil.Process()

    def resident() -> int:
        gc.collect()
        return process.memory_info().rss

    before = resident()
    reference = reference_of(policy)
    assert outputs_without_values(reference) == outputs
    shared = resident() - before
    learn(policy, 1)
    copied = resident() - before
    assert outputs_without_values(reference) == outputs
    return shared / weights, copied / weights


def outputs_without_values(model: Model) -> bytes:
    tokens, offsets, targets = networks.pack(model.config, LENGTHS).arrays
    return model.forward(tokens, offsets, targets, train=False)[1].logprobs.tobytes()
