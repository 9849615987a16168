"""The alarms of phases that learn from their own samples: what goes wrong there, by what it shows in the metrics, and what causes it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ingot.training.alarms import Metrics, Rule, above, below_share_of_start, drifted
from ingot.training.rollouts import MISMATCH_ALARM

_SMOOTHED = 5
"""Updates that are looked at together: one rollout's mean score is mostly chance."""
_FEW = 3
"""The same where it has to be quick."""


def policy_rules(*, kl_target: float | None, watched: Sequence[str] = ()) -> list[Rule]:
    """Alarms of any policy gradient.

    Parameters
    ----------
    kl_target
        Where the run holds the KL of an answer, nats; None where it is not held.
    watched
        Of ``judge`` and ``gold``, those that are measured.
    """
    return [
        above(
            "sampling and training differ",
            "sampling/sampling_logp_difference/mean",
            MISMATCH_ALARM,
            "updates are off-policy without a sign; temperature, banned ids or precision of the two are not the same",
        ),
        above(
            "first ratio",
            "val/ratio_first",
            1e-3,
            "before the first step of an update the policy must be the one that sampled: temperature, dropout or mask differ",
        ),
        _kl_rule(kl_target),
        below_share_of_start(
            "entropy collapse", "entropy", 0.2, "the policy repeats itself; give the KL or the entropy more weight"
        ),
        above("clipping", "policy/clipfrac_avg", 0.5, "learning rate or number of epochs too high"),
        above(
            "large updates",
            "policy/approxkl_avg",
            0.1,
            "learning rate or number of epochs too high; target_kl ends updates early",
        ),
        _no_signal(),
        drifted(
            "length drift",
            "completions/mean_length",
            0.5,
            "is length what is rewarded? penalise it, or regress it out of the reward",
        ),
        _correlated(),
        below_share_of_start(
            "fewer ends",
            "completions/eos_rate",
            0.5,
            "answers run into their longest length; raise missing_eos_penalty or that length",
        ),
        above(
            "numbers lost",
            "num_dropped",
            0.0,
            "log-probabilities are not finite (lower the learning rate), or no reward has anything to say about some answers",
        ),
        *[rule for name in watched for rule in (turned_against(name), overoptimised(name))],
    ]


def critic_rules() -> list[Rule]:
    """Alarms of methods with a critic."""

    def check(lines: Sequence[Metrics]) -> str | None:
        recent = lines[-_SMOOTHED:]
        if len(lines) < 50 or any(line["val/explained_variance"] >= 0.0 for line in recent):
            return None
        return (
            f"explained variance is {recent[-1]['val/explained_variance']:.2f} after {len(lines)} updates: the critic is worse than none; "
            "take lam 1, a higher vf_coef, a critic of its own, or a group method"
        )

    return [
        Rule("useless critic", ("val/explained_variance",), check),
        above(
            "value clipping",
            "val/clipfrac_avg",
            0.5,
            "rewards are large beside cliprange_value: normalise them, or turn it off",
            after=_SMOOTHED,
        ),
    ]


def tax_rule() -> Rule:
    """Alarm where text of pretraining has become less likely by more than 0.1 bits per byte."""

    def check(lines: Sequence[Metrics]) -> str | None:
        first, last = lines[0]["eval_ptx_bpb"], lines[-1]["eval_ptx_bpb"]
        if last - first <= 0.1:
            return None
        return (
            f"held-out pretraining text went from {first:.3f} to {last:.3f} bits per byte: what pretraining taught is being lost; "
            "raise ptx_coef, lower the learning rate or give the KL more weight"
        )

    return Rule("alignment tax", ("eval_ptx_bpb",), check)


def turned_against(watched: str) -> Rule:
    """Alarm where among the answers of one rollout those that the proxy prefers are those that ``watched`` does not: to raise the
    proxy further then lowers ``watched``, which the means show only once it has happened."""
    name = f"objective/{watched}_correlation"

    def check(lines: Sequence[Metrics]) -> str | None:
        recent = [line[name] for line in lines[-_FEW:]]
        mean = sum(recent) / len(recent)
        if len(recent) < _FEW or mean >= -0.5:
            return None
        return (
            f"answers that the proxy scores higher now have a lower {watched} (correlation {mean:.2f}): what is learned from here on is "
            "gaming; stop here, give the KL more weight, or renew the reward model"
        )

    return Rule(f"proxy against {watched}", (name,), check)


def overoptimised(watched: str) -> Rule:
    """Alarm where the proxy has risen since ``watched`` was at its best, and ``watched`` has fallen from there beyond chance.

    Both are means over updates in a row, whose standard error comes from the deviations within each rollout; beyond chance is
    four of them.
    """
    mean, std, size = f"objective/{watched}", f"objective/{watched}_std", "val/num_episodes"

    def check(lines: Sequence[Metrics]) -> str | None:
        if len(lines) < 2 * _FEW:
            return None
        blocks = [lines[end - _FEW : end] for end in range(_FEW, len(lines) + 1)]
        means = [sum(line[mean] for line in block) / _FEW for block in blocks]
        best = max(range(len(means)), key=means.__getitem__)
        errors = [math.sqrt(sum(line[std] ** 2 / line[size] for line in blocks[at])) / _FEW for at in (best, -1)]
        proxies = [sum(line["objective/scores"] for line in blocks[at]) / _FEW for at in (best, -1)]
        if means[best] - means[-1] <= 4 * math.hypot(*errors) or proxies[1] <= proxies[0]:
            return None
        return (
            f"since update {best + _FEW} the proxy rose from {proxies[0]:.3g} to {proxies[1]:.3g} while {watched} fell from "
            f"{means[best]:.3g} to {means[-1]:.3g}: the reward is being gamed; go back to the best evaluation, give the KL more weight, or renew the reward model"
        )

    return Rule(f"over-optimisation ({watched})", ("objective/scores", mean, std, size), check)


def _kl_rule(target: float | None) -> Rule:
    def check(lines: Sequence[Metrics]) -> str | None:
        kl, length = lines[-1]["objective/kl"], lines[-1]["completions/mean_length"]
        limit = 3 * target if target is not None else max(10.0, 10.0 * length / 50.0)
        if abs(kl) <= limit:
            return None
        why = f"3 times its target of {target:g}" if target is not None else f"{limit:.3g}"
        return (
            f"KL to the reference is {kl:.3g} nats an answer, beyond {why}: its weight is too small or the learning rate too high; "
            "what the reward model says that far away means little"
        )

    return Rule("KL", ("objective/kl", "completions/mean_length"), check)


def _no_signal() -> Rule:
    def check(lines: Sequence[Metrics]) -> str | None:
        if lines[-1]["objective/scores_std"] > 0.0:
            return None
        return "all answers are scored the same, so that there is nothing to learn: the prompts are too easy or too hard, or the reward is broken"

    return Rule("no signal", ("objective/scores_std",), check)


def _correlated() -> Rule:
    def check(lines: Sequence[Metrics]) -> str | None:
        recent = [line["objective/score_length_correlation"] for line in lines[-_SMOOTHED:]]
        mean = sum(recent) / len(recent)
        if len(recent) < _SMOOTHED or abs(mean) <= 0.5:
            return None
        return f"score and length correlate by {mean:.2f}: the reward looks at length; regress it out of the reward, or penalise it"

    return Rule("length is rewarded", ("objective/score_length_correlation",), check)


def group_rule() -> Rule:
    """Alarm of group methods where most groups say nothing."""
    return above(
        "groups without signal",
        "frac_reward_zero_std",
        0.8,
        "nearly all answers to a prompt are scored the same: prompts too easy or too hard; mix others in, or draw more answers of each",
        after=3,
    )
