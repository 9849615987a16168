"""The same losses, gradients and metrics as TRL's trainers: their own loss methods, called with what a model would have given.

A trainer's loss is a method that wants a trainer and a model. Here it gets a plain object with the attributes that it reads, and a
function that returns the log-probabilities to differentiate by: no weights, no data set, no Trainer.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer

from ingot.losses.distillation import generalized_jsd_loss
from ingot.losses.packed import count_by_sequence, mean_weights, spread, sum_by_sequence
from ingot.losses.policy import GRPO_LOSS_TYPES, grpo_loss, rloo_loss
from ingot.losses.preference import (
    CPO_LOSS_TYPES,
    LOSS_TYPES,
    Pairs,
    cpo_loss,
    dpo_loss,
    kto_loss,
    kto_reference_point,
    orpo_loss,
)
from ingot.losses.reward import pairwise_loss
from ingot.losses.sft import sft_loss
from packs import leaf

NUM_PAIRS, WIDTH = 5, 9


def trainer(**attributes):
    """What every loss method reads of a trainer: one process, training, metrics to fill."""
    accelerator = SimpleNamespace(
        device="cpu",
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    return SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def logged(stub):
    """The last value of each metric."""
    return {name: values[-1] for name, values in stub._metrics["train"].items()}


class Padded:
    """A padded batch of prompts and completions as TRL has it, and the same as a pack."""

    def __init__(self, seed: int, num_rows: int) -> None:
        rng = np.random.default_rng(seed)
        prompts, lengths = rng.integers(1, 4, num_rows), rng.integers(1, 6, num_rows)
        position = np.arange(WIDTH)
        self.attention_mask = position < (prompts + lengths)[:, None]
        self.completion_mask = self.attention_mask & (position >= prompts[:, None])
        self.input_ids = rng.integers(0, 50, (num_rows, WIDTH))
        self.scored = self.completion_mask[:, 1:]  # [rows, WIDTH - 1]: column t predicts token t + 1
        self.logprobs = np.where(self.scored, -rng.exponential(size=self.scored.shape), 0.0)
        moved = rng.normal(scale=0.3, size=(num_rows, 1)) + rng.normal(scale=0.3, size=self.scored.shape)
        self.old = np.where(self.scored, self.logprobs + moved, 0.0)
        self.ref = np.where(self.scored, self.logprobs + rng.normal(scale=0.5, size=self.scored.shape), 0.0)
        self.rng = rng
        # The pack: all tokens but the padding; the last of each row predicts nothing.
        ends = self.attention_mask.sum(1)
        self.offsets = np.concatenate([[0], np.cumsum(ends)])
        shifted = np.where(self.scored, self.input_ids[:, 1:], -1)
        self.targets = self.packed(shifted, fill=-1)

    def packed(self, padded: np.ndarray, fill: float = 0.0) -> np.ndarray:
        """[rows, WIDTH - 1] -> [N]."""
        full = np.concatenate([padded, np.full((len(padded), 1), fill, padded.dtype)], axis=1)
        return full[self.attention_mask]

    def sums(self, padded: np.ndarray) -> np.ndarray:
        return sum_by_sequence(self.packed(padded), self.targets, self.offsets)

    def inputs(self) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.tensor(self.input_ids),
            "attention_mask": torch.tensor(self.attention_mask).long(),
            "completion_mask": torch.tensor(self.completion_mask).long(),
        }

    def model(self, x: torch.Tensor):
        """Gives the log-probabilities ``x``, as the fused head would."""
        zeros = torch.zeros_like(x)
        outputs = SimpleNamespace(log_probs=x, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        return lambda **_: outputs


def assert_same_gradient(batch: Padded, ours: np.ndarray, loss: torch.Tensor, x: torch.Tensor) -> None:
    # Theirs sums over all columns, for its head gives a constant 0 where nothing is scored.
    theirs = batch.packed(np.where(batch.scored, torch.autograd.grad(loss, x)[0].numpy(), 0.0))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7 * np.abs(theirs).max())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_dpo(loss_type, seed):
    batch = Padded(seed, 2 * NUM_PAIRS)
    # Theirs smooths these; the smoothed sigmoid is older than its present list of losses.
    eps = 0.1 if loss_type in ("robust", "exo_pair", "aot", "aot_unpaired") else 0.0
    stub = trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=0.3,
        label_smoothing=eps,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
    )
    ref = torch.tensor(batch.sums(batch.ref))
    x = leaf(batch.logprobs)
    references = {"ref_chosen_logps": ref[:NUM_PAIRS], "ref_rejected_logps": ref[NUM_PAIRS:]}
    theirs = DPOTrainer._compute_loss(stub, batch.model(x), batch.inputs() | references, False)

    logps, lengths = batch.sums(batch.logprobs), count_by_sequence(batch.targets, batch.offsets)
    pairs = Pairs(
        chosen_logps=logps[:NUM_PAIRS],
        rejected_logps=logps[NUM_PAIRS:],
        ref_chosen_logps=ref[:NUM_PAIRS].numpy(),
        ref_rejected_logps=ref[NUM_PAIRS:].numpy(),
        chosen_lengths=lengths[:NUM_PAIRS],
        rejected_lengths=lengths[NUM_PAIRS:],
    )
    loss, d_chosen, d_rejected, metrics = dpo_loss(
        pairs, num_pairs=NUM_PAIRS, loss_type=loss_type, beta=0.3, label_smoothing=eps
    )
    # exo_pair has a constant of f32 in theirs.
    assert loss == pytest.approx(theirs.item(), rel=1e-6 if loss_type == "exo_pair" else 1e-12)
    ours = spread(np.concatenate([d_chosen, d_rejected]), batch.targets, batch.offsets)
    assert_same_gradient(batch, ours, theirs, x)
    for name, value in logged(stub).items():
        if name.startswith(("rewards/", "logps/")):
            assert metrics[name] == pytest.approx(value, rel=1e-6), name


def test_the_sft_term_of_dpo():
    batch = Padded(2, 2 * NUM_PAIRS)
    stub = trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sft"],
        loss_weights=[1.0],
        beta=0.1,
        use_weighting=False,
    )
    x = leaf(batch.logprobs)
    references = {"ref_chosen_logps": torch.zeros(NUM_PAIRS), "ref_rejected_logps": torch.zeros(NUM_PAIRS)}
    theirs = DPOTrainer._compute_loss(stub, batch.model(x), batch.inputs() | references, False)
    chosen = np.where(np.arange(len(batch.targets)) < batch.offsets[NUM_PAIRS], batch.targets, -1)
    weights = mean_weights(chosen >= 0, batch.offsets, reduction="token_mean", total=np.count_nonzero(chosen >= 0))
    loss, d_logprobs, *_ = sft_loss(batch.packed(batch.logprobs), chosen, weights)
    assert loss == pytest.approx(theirs.item(), rel=1e-12)
    assert_same_gradient(batch, d_logprobs, theirs, x)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type):
    batch, mismatched = Padded(3, 7), Padded(4, 7)
    labels = np.array([1, 0, 0, 1, 1, 0, 1], bool)
    with_kl = loss_type == "kto"
    # So that the policy is above the reference on the mismatched ones, and the reference point is not 0.
    kl_logps, ref_kl_logps = mismatched.sums(mismatched.logprobs) + 0.8, mismatched.sums(mismatched.ref)
    stub = trainer(
        precompute_ref_logps=True,
        calculate_KL=with_kl,
        loss_type=loss_type,
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda model, batch: torch.tensor(kl_logps),
    )
    ref = batch.sums(batch.ref)
    x = leaf(batch.logprobs)
    extra = {
        "label": torch.tensor(labels),
        "ref_logps": torch.tensor(ref),
        "ref_KL_logps": torch.tensor(ref_kl_logps),
    }
    theirs = KTOTrainer._compute_loss(stub, batch.model(x), batch.inputs() | extra, False)
    kl = kto_reference_point(kl_logps, ref_kl_logps) if with_kl else 0.0
    assert kl > 0 or not with_kl
    loss, d_logps, metrics = kto_loss(
        batch.sums(batch.logprobs),
        ref,
        labels,
        kl=kl,
        num_chosen=4,
        num_rejected=3,
        loss_type=loss_type,
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
    )
    assert loss == pytest.approx(theirs.item(), rel=1e-12)
    assert_same_gradient(batch, spread(d_logps, batch.targets, batch.offsets), theirs, x)
    for name, value in logged(stub).items():
        if name.startswith(("rewards/", "logps/")):
            assert metrics[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("delta", [None, 1.6])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("of", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", GRPO_LOSS_TYPES)
def test_grpo(loss_type, of, beta, delta):
    cispo = loss_type == "cispo"
    delta = None if cispo else delta
    batch = Padded(5, 8)
    advantages = batch.rng.normal(size=8)
    high, num_tokens = (1.1 if cispo else 0.25), int(batch.scored.sum())
    x = leaf(batch.logprobs)
    stub = trainer(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=of,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.15,
        epsilon_high=high,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=WIDTH,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (x, torch.zeros_like(x), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(8, 1).long(),
        "prompt_mask": torch.ones(8, 1).long(),
        "completion_ids": torch.zeros(8, WIDTH - 1).long(),
        "completion_mask": torch.tensor(batch.scored).long(),
        "advantages": torch.tensor(advantages),
        "old_per_token_logps": torch.tensor(batch.old),
        "ref_per_token_logps": torch.tensor(batch.ref),
        "num_items_in_batch": torch.tensor(float(num_tokens)),
    }
    theirs = GRPOTrainer._compute_loss(stub, None, inputs)
    loss, d_logprobs, metrics = grpo_loss(
        batch.packed(batch.logprobs),
        batch.packed(batch.old),
        advantages,
        batch.targets,
        batch.offsets,
        num_sequences=8,
        num_tokens=num_tokens,
        max_completion_length=WIDTH if loss_type == "dr_grpo" else None,
        loss_type=loss_type,
        importance_sampling_level=of,
        epsilon=0.15,
        epsilon_high=high,
        delta=delta,
        beta=beta,
        ref_logprobs=batch.packed(batch.ref) if beta else None,
    )
    assert loss == pytest.approx(theirs.item(), rel=1e-6)
    assert_same_gradient(batch, d_logprobs, theirs, x)
    theirs_logged = logged(stub)
    for name in (
        "kl",
        "cispo_clip_ratio",
        *(f"clip_ratio/{which}" for which in ("low_mean", "high_mean", "region_mean")),
    ):
        if name in theirs_logged:
            assert metrics[name] == pytest.approx(theirs_logged[name], rel=1e-6), name
    if not cispo:
        assert metrics["clip_ratio/low_min"] == pytest.approx(theirs_logged["clip_ratio/low_min"])
        assert metrics["clip_ratio/high_max"] == pytest.approx(theirs_logged["clip_ratio/high_max"])
        assert metrics["clip_ratio/region_mean"] > 0


def test_rloo():
    batch = Padded(6, 8)
    advantages = batch.rng.normal(size=8)
    x = leaf(batch.logprobs)
    stub = trainer(
        epsilon_low=0.15,
        epsilon_high=0.25,
        _get_per_token_logps_and_entropies=lambda *_, **__: (x, torch.zeros_like(x), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(8, 1).long(),
        "prompt_mask": torch.ones(8, 1).long(),
        "completion_ids": torch.zeros(8, WIDTH - 1).long(),
        "completion_mask": torch.tensor(batch.scored).long(),
        "advantages": torch.tensor(advantages),
        "old_logps": torch.tensor(batch.sums(batch.old)),
    }
    theirs = RLOOTrainer._compute_loss(stub, None, inputs)
    loss, d_logprobs, metrics = rloo_loss(
        batch.packed(batch.logprobs),
        batch.packed(batch.old),
        advantages,
        batch.targets,
        batch.offsets,
        num_sequences=8,
        epsilon=0.15,
        epsilon_high=0.25,
    )
    assert loss == pytest.approx(theirs.item(), rel=1e-6)
    assert_same_gradient(batch, d_logprobs, theirs, x)
    assert metrics["clip_ratio/region_mean"] == logged(stub)["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.01])
def test_reward(margin, center):
    rng = np.random.default_rng(7)
    rewards, margins = rng.normal(size=2 * NUM_PAIRS), rng.random(NUM_PAIRS)
    x = leaf(rewards)
    stub = trainer(args=SimpleNamespace(center_rewards_coefficient=center))
    inputs = {"attention_mask": torch.ones(2 * NUM_PAIRS, 3).long()} | (
        {"margin": torch.tensor(margins)} if margin else {}
    )
    theirs = RewardTrainer.compute_loss(stub, lambda **_: SimpleNamespace(logits=x[:, None]), inputs)
    loss, d_chosen, d_rejected, metrics = pairwise_loss(
        rewards[:NUM_PAIRS],
        rewards[NUM_PAIRS:],
        num_pairs=NUM_PAIRS,
        margins=margins if margin else None,
        center_rewards_coefficient=center or 0.0,
    )
    assert loss == pytest.approx(theirs.item(), rel=1e-12)
    gradient = torch.autograd.grad(theirs, x)[0].numpy()
    np.testing.assert_allclose(np.concatenate([d_chosen, d_rejected]), gradient, rtol=1e-12)
    for name in ("accuracy", "margin", "min_reward", "mean_reward", "max_reward"):
        assert metrics[name] == pytest.approx(logged(stub)[name], rel=1e-6), name


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.8, 1.0])
def test_generalized_jsd(beta):
    rng = np.random.default_rng(8)
    x, teacher = leaf(rng.normal(size=(2, 3, 7))), torch.tensor(rng.normal(size=(2, 3, 7)))
    labels = torch.tensor([[0, -100, 1], [2, 3, -100]])
    theirs = GKDTrainer.generalized_jsd_loss(x, teacher, labels, beta=beta, temperature=0.7, num_items_in_batch=4)
    lp, lq = (torch.log_softmax(each / 0.7, -1).reshape(6, 7) for each in (x, teacher))
    counted = labels.ravel() != -100
    offsets = np.concatenate([[0], np.cumsum(7 * counted.numpy())])
    loss, d_candidates, _ = generalized_jsd_loss(
        lp[counted].detach().numpy().ravel(), lq[counted].numpy().ravel(), offsets, np.full(6, 0.25), beta=beta
    )
    assert loss == pytest.approx(theirs.item(), rel=1e-6)
    sent = torch.autograd.grad(lp[counted].ravel(), x, torch.tensor(d_candidates).double(), retain_graph=True)[0]
    np.testing.assert_allclose(sent, torch.autograd.grad(theirs, x)[0], rtol=1e-4, atol=1e-7)


def without_reference(logps, lengths):
    return Pairs.without_reference(
        chosen_logps=logps[0], rejected_logps=logps[1], chosen_lengths=lengths[0], rejected_lengths=lengths[1]
    )


@pytest.mark.parametrize("loss_type", CPO_LOSS_TYPES)
def test_cpo_and_simpo(loss_type):
    rng = np.random.default_rng(8)
    logps, lengths = -rng.exponential(size=(2, NUM_PAIRS)) * 4, rng.integers(1, 9, (2, NUM_PAIRS))
    eps = 0.1 if loss_type in ("sigmoid", "simpo") else 0.0
    stub = trainer(alpha=0.0, loss_type=loss_type, simpo_gamma=0.5, beta=2.0, label_smoothing=eps)
    chosen, rejected = leaf(logps[0]), leaf(logps[1])
    # Theirs takes means over tokens for these two, from its own forward pass.
    divide = lengths if loss_type in ("ipo", "simpo") else np.ones_like(lengths)
    losses, *rewards = CPOTrainer.cpo_loss(stub, chosen / torch.tensor(divide[0]), rejected / torch.tensor(divide[1]))
    loss, d_chosen, d_rejected, metrics = cpo_loss(
        without_reference(logps, lengths),
        num_pairs=NUM_PAIRS,
        loss_type=loss_type,
        beta=2.0,
        label_smoothing=eps,
        simpo_gamma=0.5,
        cpo_alpha=0.0,
    )
    assert loss == pytest.approx(losses.mean().item(), rel=1e-12)
    theirs = torch.autograd.grad(losses.mean(), (chosen, rejected))
    np.testing.assert_allclose(np.stack([d_chosen, d_rejected]), np.stack(theirs), rtol=1e-9)
    assert metrics["rewards/chosen"] == pytest.approx(rewards[0].mean().item())


def test_orpo():
    rng = np.random.default_rng(9)
    lengths = rng.integers(1, 9, (2, NUM_PAIRS))
    logps = -rng.exponential(size=(2, NUM_PAIRS)) * lengths
    stub = trainer(beta=0.2)
    chosen, rejected = leaf(logps[0]), leaf(logps[1])
    losses, chosen_rewards, _, ratio, log_odds = ORPOTrainer.odds_ratio_loss(
        stub, chosen / torch.tensor(lengths[0]), rejected / torch.tensor(lengths[1])
    )
    theirs = -losses.mean()  # added to the likelihood of the chosen there
    loss, d_chosen, d_rejected, metrics = orpo_loss(
        without_reference(logps, lengths), num_pairs=NUM_PAIRS, beta=0.2, nll=False
    )
    assert loss == pytest.approx(theirs.item(), rel=1e-5)  # theirs is in f32
    gradient = torch.autograd.grad(theirs, (chosen, rejected))
    np.testing.assert_allclose(np.stack([d_chosen, d_rejected]), np.stack(gradient), rtol=1e-5)
    assert metrics["log_odds_ratio"] == pytest.approx(ratio.item(), rel=1e-5)
    assert metrics["log_odds_chosen"] == pytest.approx(log_odds.item(), rel=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(chosen_rewards.mean().item(), rel=1e-5)
