"""What the settings leave open (how long, how often), decided once and recorded, and what it will cost in time and memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ingot.configs import RunConfig, parse_duration
from ingot.environment import memory_limit, peak_memory
from ingot.training.cost import Cost, Probe, fit_to_time, save_estimate_s
from ingot.training.memory import Held, memory_estimate
from ingot.training.progress import Display, duration

if TYPE_CHECKING:
    from ingot.models.base import Model


@dataclasses.dataclass(frozen=True)
class Decisions:
    """Recorded in run.json, so that a resumed run has the same schedule."""

    max_steps: int
    eval_steps: int
    save_steps: int
    eval_batches: int | None
    """None: the whole held-out part."""


def decide(
    config: RunConfig,
    model: Model,
    probe: Probe,
    known: dict[str, Any],
    *,
    steps_per_epoch: float,
    default_steps: int,
    held: Sequence[Held],
) -> tuple[Decisions, Cost]:
    """Settle what is open; what is ``known`` from an earlier start of the run stays.

    Parameters
    ----------
    default_steps
        Where no length is given.
    held
        The run's networks.

    Raises
    ------
    ConfigError
        Too few steps fit into max_time.
    """
    eval_batches = known.get("eval_batches", config.eval_batches)
    save_s = save_estimate_s(model.config)
    if "max_steps" in known:
        max_steps = int(known["max_steps"])
    elif config.max_time is not None:
        limit = probe.evaluation_batches if eval_batches is None else min(probe.evaluation_batches, eval_batches)
        budget_s = parse_duration(config.max_time)
        max_steps, fitting = fit_to_time(budget_s, probe.step_s, save_s, probe.evaluation_batch_s, limit)
        eval_batches = eval_batches if fitting is None else fitting
    elif config.num_train_epochs is not None:
        max_steps = max(1, math.ceil(config.num_train_epochs * steps_per_epoch))
    else:
        max_steps = config.max_steps or default_steps
    eval_steps = int(known.get("eval_steps", config.eval_steps or -(-max_steps // 10)))
    save_steps = int(known.get("save_steps", config.save_steps or eval_steps))
    used = probe.evaluation_batches if eval_batches is None else min(probe.evaluation_batches, eval_batches)
    cost = Cost(
        step_s=probe.step_s,
        evaluation_s=probe.evaluation_batch_s * used,
        save_s=save_s,
        memory_bytes=max(memory_estimate(*held), peak_memory()),
    )
    return Decisions(max_steps, eval_steps, save_steps, eval_batches), cost


def expected_s(decisions: Decisions, cost: Cost, done: int = 0) -> float:
    """Seconds of the run from step ``done`` on, with its evaluations and checkpoints."""
    remaining = decisions.max_steps - done
    return cost.total_s(remaining, remaining // decisions.eval_steps + 2, remaining // decisions.save_steps + 1)


def plan_of(decisions: Decisions, cost: Cost) -> dict[str, Any]:
    """What a dry run has found out, for a program."""
    return {
        **dataclasses.asdict(decisions),
        "expected_s": expected_s(decisions, cost),
        **dataclasses.asdict(cost),
    }


def announce(
    config: RunConfig,
    model: Model,
    probe: Probe,
    decisions: Decisions,
    cost: Cost,
    done: int,
    display: Display,
    *,
    kind: str,
    data: str,
    shape: str,
    passes: float,
) -> None:
    """Say what the run is and what it costs from step ``done`` on.

    Parameters
    ----------
    kind, data
        One word for what is learned from, and how much of it is learned from and held out.
    shape
        How a step is made up.
    passes
        Of the remaining steps over the data.
    """
    remaining = decisions.max_steps - done
    evaluations = remaining // decisions.eval_steps + 2 if probe.evaluation_batches else 0
    display.say(
        f"network   {model.config.num_hidden_layers} layers of width {model.config.hidden_size}, {model.num_parameters:,} parameters; "
        f"{model.backend} backend, level {model.level}, {model.threads} thread{'' if model.threads == 1 else 's'}"
    )
    if model.active_adapter is not None:
        adapter = model.adapters[model.active_adapter]
        display.say(
            f"adapter   rank {adapter.rank}, alpha {adapter.alpha:g}, on {len(adapter.modules)} linear layers: {adapter.num_parameters:,} "
            f"parameters are trained ({100 * adapter.num_parameters / model.num_parameters:.2g} %), the others stay as they are"
        )
    display.say(f"{kind:<10}{data}")
    display.say(
        f"length    {remaining:,} step{'' if remaining == 1 else 's'} of about {probe.step_tokens:,} tokens ({shape}), {passes:.2f} passes"
    )
    display.say(
        f"cost      about {duration(expected_s(decisions, cost, done))}: steps {duration(remaining * cost.step_s)} at {probe.step_tokens / cost.step_s:,.0f} "
        f"tokens/s, held-out losses {duration(evaluations * cost.evaluation_s)}, timed just now on the run's first batch; "
        f"memory about {cost.memory_bytes / 1e9:.2f} of {memory_limit() / 1e9:.1f} GB"
    )
    if config.eval_batches is None and decisions.eval_batches is not None:
        display.say(
            f"held out  measured on {decisions.eval_batches} of {probe.evaluation_batches} batches each time, to fit into {config.max_time}"
        )
