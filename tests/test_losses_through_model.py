"""Objectives at work on the native core: the gradient that reaches the weights is the slope of the loss, whole or in micro-batches."""

from __future__ import annotations

import numpy as np
import pytest

from ingot.losses.distillation import topk_distillation_loss
from ingot.losses.kl import kl_loss
from ingot.losses.packed import count_by_sequence, mean_weights, spread, sum_by_sequence
from ingot.losses.policy import entropy_bonus, grpo_loss, ppo_policy_loss, value_loss
from ingot.losses.preference import Pairs, dpo_loss
from ingot.losses.reward import count_groups, kwise_loss, rewards_at_ends, spread_to_ends
from ingot.losses.sft import sft_loss
from networks import SHAPES, native, pack, perturbed, worst_ratio

LENGTHS = [5, 9, 1, 14, 7, 7, 12, 3]
CONFIG = SHAPES["llama"]
NUM_VALUES = 2


WANT = {
    "sft": ("logprobs", "lse", "zbar"),
    "dpo": ("logprobs",),
    "ppo": ("logprobs", "values", "entropy"),
    "grpo": ("logprobs",),
    "reward": ("values",),
    "distillation": ("candidate_logprobs",),
}
"""What each objective asks of the model."""


class Task:
    """An objective over eight sequences: what it asks of the model, and from that its loss and gradients."""

    def __init__(self) -> None:
        self.whole = pack(CONFIG, LENGTHS, share=0.8)
        rng = np.random.default_rng(7)
        num_tokens = len(self.whole.tokens)
        self.noise, self.other = rng.normal(scale=0.1, size=(2, num_tokens)), rng.normal(size=(2, num_tokens))
        self.ranks = np.column_stack([rng.permutation(8) + 1, rng.integers(0, 4, 8)])
        self.advantages = rng.normal(size=8)
        self.num_tokens = np.count_nonzero(self.whole.targets >= 0)
        # What the policy and its reference gave at the start, to compare with later.
        _, out = native(CONFIG, perturbed(CONFIG, NUM_VALUES), NUM_VALUES).forward(
            *self.whole.arrays, want=("logprobs", "values"), train=False
        )
        self.old, self.old_values = out.logprobs + self.noise[0], out.values[:, 0] + self.noise[1]
        self.ref = out.logprobs + 0.5 * self.other[0]
        # A teacher's five likeliest tokens and what it gives them; tokens without a target have none.
        likeliest = rng.dirichlet(np.ones(CONFIG.vocab_size), num_tokens)
        self.likeliest = np.argsort(-likeliest, axis=1)[:, :5].astype(np.int32)
        self.teacher = np.log(np.take_along_axis(likeliest, self.likeliest, axis=1))

    def sft(self, out, part, rows, _):
        weights = mean_weights(part.targets >= 0, part.offsets, reduction="token_mean", total=self.num_tokens)
        loss, d_logprobs, d_lse, d_zbar, _ = sft_loss(
            out.logprobs, part.targets, weights, label_smoothing=0.1, z_loss=1e-3, lse=out.lse, zbar=out.zbar
        )
        return loss, {"d_logprobs": d_logprobs, "d_lse": d_lse, "d_zbar": d_zbar}

    def dpo(self, out, part, rows, _):
        logps, lengths = (
            sum_by_sequence(out.logprobs, part.targets, part.offsets),
            count_by_sequence(part.targets, part.offsets),
        )
        ref = sum_by_sequence(self.ref[rows], part.targets, part.offsets)
        pairs = Pairs(
            chosen_logps=logps[0::2],
            rejected_logps=logps[1::2],
            ref_chosen_logps=ref[0::2],
            ref_rejected_logps=ref[1::2],
            chosen_lengths=lengths[0::2],
            rejected_lengths=lengths[1::2],
        )
        loss, d_chosen, d_rejected, _ = dpo_loss(pairs, num_pairs=4, beta=0.2)
        d_logps = np.stack([d_chosen, d_rejected], axis=1).ravel()
        return loss, {"d_logprobs": spread(d_logps, part.targets, part.offsets)}

    def ppo(self, out, part, rows, _):
        wanted = {"num_tokens": self.num_tokens}
        policy, d_logprobs, _ = ppo_policy_loss(
            out.logprobs, self.old[rows], self.other[0][rows], part.targets, **wanted
        )
        values, returns = out.values[:, 0], self.other[1][rows]
        critic, d_values, _ = value_loss(values, self.old_values[rows], returns, part.targets, vf_coef=0.5, **wanted)
        bonus, d_entropy, _ = entropy_bonus(out.entropy, part.targets, ent_coef=1.0, **wanted)
        weights = mean_weights(part.targets >= 0, part.offsets, reduction="token_mean", total=self.num_tokens)
        penalty, d_kl, _ = kl_loss(out.logprobs, self.ref[rows], part.targets, weights, beta=0.1, kl_estimator="k2")
        both = np.stack([d_values, np.zeros_like(d_values)], axis=1)
        gradients = {"d_logprobs": d_logprobs + d_kl, "d_values": both, "d_entropy": d_entropy}
        return policy + critic + bonus + penalty, gradients

    def grpo(self, out, part, rows, sequences):
        loss, d_logprobs, _ = grpo_loss(
            out.logprobs,
            self.old[rows],
            self.advantages[sequences],
            part.targets,
            part.offsets,
            num_sequences=8,
            num_tokens=self.num_tokens,
            loss_type="grpo",
            importance_sampling_level="sequence",
            beta=0.1,
            ref_logprobs=self.ref[rows],
        )
        return loss, {"d_logprobs": d_logprobs}

    def reward(self, out, part, rows, sequences):
        groups = np.arange(0, len(part.offsets), 2)
        total = count_groups(self.ranks, np.arange(0, 9, 2))
        loss, d_rewards, _ = kwise_loss(
            rewards_at_ends(out.values, part.offsets),
            self.ranks[sequences],
            groups,
            num_groups=total,
            center_rewards_coefficient=0.05,
        )
        return loss, {"d_values": spread_to_ends(d_rewards, part.offsets)}

    def candidates(self, part, rows):
        counts = np.where(part.targets >= 0, 5, 0)
        return np.concatenate([[0], np.cumsum(counts)]), self.likeliest[rows][part.targets >= 0].ravel()

    def distillation(self, out, part, rows, _):
        weights = mean_weights(part.targets >= 0, part.offsets, reduction="token_mean", total=self.num_tokens)
        offsets, _ = self.candidates(part, rows)
        teacher = self.teacher[rows][part.targets >= 0].ravel()
        loss, d_candidates, _ = topk_distillation_loss(out.candidate_logprobs, teacher, offsets, weights)
        return loss, {"d_candidates": d_candidates}

    def loss(self, model, name, *, parts=1, backward=False):
        """The loss of the step, in ``parts`` batches of as many sequences each."""
        total, each = 0.0, 8 // parts
        for first in range(0, 8, each):
            sequences = slice(first, first + each)
            offsets = self.whole.offsets[first : first + each + 1]
            rows = slice(int(offsets[0]), int(offsets[-1]))
            part = type(self.whole)(self.whole.tokens[rows], offsets - offsets[0], self.whole.targets[rows])
            # Rewards are read where there is no target too.
            value_rows = {"value_rows": np.ones(len(part.tokens), bool)} if "values" in WANT[name] else {}
            extra = {"candidates": self.candidates(part, rows)} if name == "distillation" else value_rows
            ctx, out = model.forward(*part.arrays, want=WANT[name], train=backward, **extra)
            loss, gradients = getattr(self, name)(out, part, rows, sequences)
            total += loss
            if backward:
                model.backward(ctx, **gradients)
        return total


@pytest.mark.parametrize("name", WANT)
def test_the_gradient_is_the_slope_of_the_loss(name):
    task = Task()
    model = native(CONFIG, perturbed(CONFIG, NUM_VALUES), NUM_VALUES)
    task.loss(model, name, backward=True)
    gradients = {key: value.astype(np.float64) for key, value in model.gradients.items()}
    size = np.sqrt(sum((value**2).sum() for value in gradients.values()))
    start = {key: value.copy() for key, value in model.parameters.items()}
    losses = []
    for sign in (1, -1):
        for key, weight in model.parameters.items():
            weight[...] = start[key] + sign * 0.002 / size**2 * gradients[key]
        losses.append(task.loss(model, name))
    slope = (losses[0] - losses[1]) / (2 * 0.002 / size)
    assert slope == pytest.approx(size, rel=1e-2)


@pytest.mark.parametrize("name", WANT)
def test_one_batch_and_its_parts_have_one_gradient(name):
    task = Task()
    whole, parts = (native(CONFIG, perturbed(CONFIG, NUM_VALUES), NUM_VALUES) for _ in range(2))
    # Groups stay together: pairs in DPO, lists of two in the reward model.
    num_parts = 4 if name in ("dpo", "reward") else 8
    loss, again = task.loss(whole, name, backward=True), task.loss(parts, name, parts=num_parts, backward=True)
    assert again == pytest.approx(loss, rel=1e-6)
    ratio, worst = worst_ratio(parts.gradients, dict(whole.gradients), 1e-5, 1e-9)
    assert ratio <= 1, worst
