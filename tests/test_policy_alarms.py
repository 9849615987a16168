"""Alarms of policy gradients: each speaks where its sign is there, and not before."""

from __future__ import annotations

from typing import Any

import pytest

from ingot.training.alarms import Alarms
from ingot.training.policy_alarms import critic_rules, group_rule, policy_rules, tax_rule

HEALTHY: dict[str, float] = {
    "sampling/sampling_logp_difference/mean": 0.0,
    "val/ratio_first": 0.0,
    "objective/kl": 3.0,
    "completions/mean_length": 40.0,
    "entropy": 2.0,
    "policy/clipfrac_avg": 0.1,
    "policy/approxkl_avg": 0.01,
    "objective/scores": 1.0,
    "objective/scores_std": 1.0,
    "objective/score_length_correlation": 0.1,
    "completions/eos_rate": 0.9,
    "num_dropped": 0.0,
    "objective/gold": 1.0,
    "objective/gold_std": 1.0,
    "objective/gold_correlation": 0.3,
    "val/num_episodes": 64.0,
    "val/explained_variance": 0.4,
    "val/clipfrac_avg": 0.1,
    "frac_reward_zero_std": 0.2,
    "eval_ptx_bpb": 2.0,
}


def raised(
    changes: dict[str, float], *, healthy: int = 5, wrong: int = 5, target: float | None = None
) -> dict[str, int]:
    """Alarms and the update at which each began, over healthy updates and as many wrong ones; 0 is the first wrong one."""
    alarms = Alarms([*policy_rules(kl_target=target, watched=["gold"]), *critic_rules(), group_rule(), tax_rule()])
    found: dict[str, int] = {}
    for number in range(healthy + wrong):
        line: dict[str, Any] = {**HEALTHY, **(changes if number >= healthy else {})}
        for name, message in alarms.check(line):
            assert "\n" not in message
            found.setdefault(name, number - healthy)
    return found


@pytest.mark.parametrize(
    ("changes", "name", "after"),
    [
        ({"sampling/sampling_logp_difference/mean": 1e-3}, "sampling and training differ", 0),
        ({"val/ratio_first": 0.01}, "first ratio", 0),
        ({"objective/kl": 10.5}, "KL", 0),
        ({"entropy": 0.39}, "entropy collapse", 0),
        ({"policy/clipfrac_avg": 0.6}, "clipping", 0),
        ({"policy/approxkl_avg": 0.2}, "large updates", 0),
        ({"objective/scores_std": 0.0}, "no signal", 0),
        ({"completions/mean_length": 61.0}, "length drift", 0),
        ({"objective/score_length_correlation": 0.8}, "length is rewarded", 2),
        ({"completions/eos_rate": 0.4}, "fewer ends", 0),
        ({"num_dropped": 1.0}, "numbers lost", 0),
        ({"objective/gold_correlation": -0.8}, "proxy against gold", 2),
        ({"objective/gold": 0.3, "objective/scores": 2.0}, "over-optimisation (gold)", 1),
        ({"val/clipfrac_avg": 0.6}, "value clipping", 4),
        ({"frac_reward_zero_std": 0.9}, "groups without signal", 2),
        ({"eval_ptx_bpb": 2.2}, "alignment tax", 0),
    ],
)
def test_a_sign_raises_its_alarm_and_no_other(changes, name, after):
    assert raised({}) == {}
    assert raised(changes) == {name: after}


def test_what_is_no_sign():
    # Within chance; both fall together; a KL near its target; a length at which ten nats are little.
    assert raised({"objective/gold": 0.7, "objective/scores": 2.0}) == {}
    assert raised({"objective/gold": 0.3, "objective/scores": 0.5}) == {}
    assert raised({"objective/kl": 17.0}, target=6.0) == {}
    assert raised({"objective/kl": 19.0}, target=6.0) == {"KL": 0}
    assert raised({"val/explained_variance": -0.5}) == {}
    assert raised({"val/explained_variance": -0.5}, healthy=44, wrong=10) == {"useless critic": 5}
