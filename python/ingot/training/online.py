"""What the loops that learn from their own samples share: rollouts, measuring on held-out prompts, what is said of the run at its end.

A phase is a subclass with its own ``loop`` and ``train_step``. All that it changes between two updates is in weights, moments and
``State``, so a run that was killed while it sampled or learned draws the same answers again and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ingot.configs import OnlineConfig
from ingot.data.batches import mix
from ingot.errors import RunError
from ingot.inference.intervals import Mean, mean_of
from ingot.losses.numerics import Float64, f64
from ingot.models.base import StepInfo
from ingot.reporting.charts import Series, draw_chart
from ingot.training.alarms import Rule
from ingot.training.callbacks import Callback
from ingot.training.cost import Cost
from ingot.training.decisions import Decisions
from ingot.training.experience import Draw, Experience, gather, shown
from ingot.training.gates import best_of_n, gate_verdict
from ingot.training.progress import Display, Status
from ingot.training.rewards import RewardError
from ingot.training.runs import RunFolder
from ingot.training.setup import Setup
from ingot.training.state import State
from ingot.training.synced_reference import SyncedReference
from ingot.training.trainer import Stopped, Trainer, resume_command
from ingot.training.verdicts import Verdict

OnlineT = TypeVar("OnlineT", bound=OnlineConfig)

_HELD_OUT_STREAM = 7
_GATE_STREAM = 8
_GATE_PROMPTS = 64
_WATCHED = ("score", "judge", "gold")
_LABELS = {
    "score": "proxy (trained against)",
    "judge": "judge (not trained against)",
    "gold": "gold",
    "kl": "KL to the start, nats an answer",
    "eos_rate": "share of answers that end",
}


class OnlineTrainer(Trainer[OnlineT]):
    """A run in progress.

    ``state.extra`` holds ``position`` and ``episode`` (:class:`~ingot.training.experience.Draw`), ``first`` and ``best`` (scores of the
    held-out answers at the start and at the exported step), and what else the phase puts there.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: OnlineT,
        setup: Setup,
        state: State,
        decisions: Decisions,
        cost: Cost,
        display: Display,
        callbacks: Sequence[Callback],
        *,
        rules: Sequence[Rule] = (),
    ) -> None:
        super().__init__(
            folder,
            config,
            setup.policy,
            setup.encoder.tokenizer,
            state,
            decisions,
            cost,
            display,
            callbacks,
            max_length=setup.prompts.longest + setup.max_new_tokens,
            encoder=setup.encoder.chat,
            rules=rules,
        )
        self.setup = setup
        self.reference = SyncedReference(config, setup.reference, folder.path, state.step)
        self.reference.announce(decisions.max_steps, display)
        self.export_by = config.export_by or ("judge" if setup.scorers.has_judge else "objective")
        batches = decisions.eval_batches
        limit = None if batches is None else batches * config.per_device_train_batch_size
        self.held_out = setup.prompts.held_out_sample(limit)
        self.before = {
            line["prompt"]: line["completion"]
            for line in folder.samples.read()
            if line["step"] == 0 and "prompt" in line
        }
        """What the model answered at the start, by prompt."""
        self._figures: tuple[str, ...] = ()

    # ---- rollouts

    @property
    def draw(self) -> Draw:
        """Where the next rollout begins."""
        extra = self.state.extra
        return Draw(extra.get("position", 0), extra.get("episode", 0))

    @draw.setter
    def draw(self, draw: Draw) -> None:
        self.state.extra |= {"position": draw.position, "episode": draw.episode}

    def collect(
        self, draw: Draw, num_prompts: int, num_generations: int = 1, *, values: bool = False
    ) -> tuple[Experience, Draw]:
        """A rollout from ``draw`` on, and where the next one begins. Nothing changes until :attr:`draw` is set to that.

        Raises
        ------
        Stopped
            Ctrl-C while it was drawn.
        RewardError
            A reward function failed.
        """
        experience = gather(
            self.setup,
            self.setup.prompts.take(draw.position, num_prompts),
            policy=self.model,
            num_generations=num_generations,
            first_episode=draw.episode,
            seed=self.config.seed,
            values=values,
            reference=self.reference.model,
            progress=self.alive,
        )
        return experience, Draw(draw.position + num_prompts, draw.episode + num_prompts * num_generations)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """A reward that fails in here ends the run, but loses nothing: what was learned before is saved."""
        try:
            yield
        except RewardError as error:
            self.save(required=False)
            raise RunError(f"{error}; {self.last_checkpoint()}; mend it, then: {resume_command(self.folder)}") from None

    # ---- updates

    def count_update(
        self,
        loss: float,
        infos: Sequence[StepInfo],
        experience: Experience,
        draw: Draw,
        began: float,
        metrics: Mapping[str, float],
    ) -> None:
        """An update is done: its figures go to the display, and with those of its experience into a line of metrics.jsonl.

        Parameters
        ----------
        loss
            Mean of the update's steps.
        infos
            Of its steps.
        draw
            Where the next rollout begins.
        began
            On the clock of ``time.perf_counter``.
        metrics
            What the phase has to say beside :meth:`Experience.metrics`.
        """
        took_s = time.perf_counter() - began
        self.draw = draw
        grad_norm = float(np.mean([info.grad_norm for info in infos])) if infos else 0.0
        skipped = bool(infos) and all(info.skipped for info in infos)
        found = {**experience.metrics(), **metrics}
        score = found.get("objective/scores", math.nan)
        self._figures = (f"score {score:.3f}", f"KL {found['objective/kl']:z.2f}")
        rate = self.learning_rate()
        self.count(loss, StepInfo(grad_norm, skipped), int(experience.rollouts.num_actions.sum()), began)
        self.reference.follow(self)
        if self.due(self.config.logging_steps):
            passes = draw.position / len(self.setup.prompts.train)
            self.log(
                passes,
                grad_norm,
                rate,
                episode=draw.episode,
                **found,
                **_times(experience.seconds, took_s, len(experience)),
            )

    def status(self, loss: float | None) -> Status:
        """Score and KL instead of a loss. Of the peak nothing is said: an update passes over its tokens several times."""
        status = self.pace.status(self.state.step, loss, None)
        return dataclasses.replace(status, figures=self._figures, share_of_peak=None)

    def save_more(self, folder: Path) -> None:
        """The reference, where it has moved."""
        self.reference.save(folder)

    # ---- measuring

    def evaluate(self) -> None:
        """Answers to held-out prompts, the same prompts and random numbers each time. Given up when asked to stop."""
        state = self.state
        if not self.held_out:
            state.evaluated_step = state.step
            return
        began = time.perf_counter()
        try:
            experience = self.answer_held_out()
        except Stopped:
            return
        took_s = time.perf_counter() - began
        self.pace.evaluation_took(took_s)
        scores, kl = experience.scores, experience.kl
        found = {f"eval_{name}": value for name, value in self.measures(experience).items()}
        metrics = {"step": state.step, **found, "time/evaluation_s": took_s}
        self.record_answers(experience)
        each: dict[str, list[float | None]] = {
            name: _plain(values)
            for name, values in (("score", scores.total), ("judge", scores.judge), ("gold", scores.gold), ("kl", kl))
            if values is not None
        }
        each["ended"] = _plain(f64(~experience.rollouts.truncated))
        if state.step == 0:
            state.extra["first"] = {"figures": found, "each": each}
        self.display.say(f"step {state.step}  {_in_words(found)}")
        if self.export_by == "last":
            self.record(metrics)
        else:
            self.measured(-found[f"eval_{self.export_by}"], metrics)
        if state.best_step in (state.step, None):
            state.extra["best"] = {"figures": found, "each": each, "step": state.step}
        state.evaluated_step = state.step
        self.notify(lambda callback, view: callback.on_evaluate(view, metrics))

    def answer_held_out(self) -> Experience:
        """Answers to the held-out prompts by the weights as they are."""
        return gather(
            self.setup,
            self.held_out,
            policy=self.model,
            first_episode=0,
            seed=mix(self.config.seed, _HELD_OUT_STREAM),
            progress=self.alive,
        )

    def measures(self, experience: Experience) -> dict[str, float]:
        """What is measured on held-out answers: proxy (``score``), judge and gold, KL, objective, entropy, ends, length, diversity."""
        found = experience.metrics()
        measures = {
            "score": found.get("objective/scores", math.nan),
            "kl": found["objective/kl"],
            "objective": found.get("objective/scores", math.nan) - self.kl_weight * found["objective/kl"],
            "entropy": found["entropy"],
            "eos_rate": found["completions/eos_rate"],
            "mean_length": found["completions/mean_length"],
            "distinct_2": found["completions/distinct_2"],
            "repetition": found["completions/repetition"],
        }
        watched = {name: found[f"objective/{name}"] for name in ("judge", "gold") if f"objective/{name}" in found}
        return {**measures, **watched}

    @property
    def kl_weight(self) -> float:
        """What a nat of KL costs in the objective that the run is judged by; the phase's own coefficient, as configured."""
        return 0.0

    def record_answers(self, experience: Experience) -> None:
        """Some answers, each with what the model answered at the start."""
        scores, kl = experience.scores, experience.kl
        for number in range(min(self.config.sample_prompts, len(experience))):
            prompt, completion = shown(experience.prompts[number].content), experience.texts[number]
            before = self.before.setdefault(prompt, completion)
            watched = {"score": scores.total, "judge": scores.judge, "gold": scores.gold, "kl": kl}
            self.record_sample(
                prompt=prompt,
                completion=completion,
                before=before,
                ended=not bool(experience.rollouts.truncated[number]),
                **{name: float(values[number]) for name, values in watched.items() if values is not None},
            )
            if number == 0:
                self.show_sample(f"{prompt}\n{completion}")

    # ---- the end

    def verdict(self) -> Verdict | None:
        """Whether the exported weights answer held-out prompts better than those that the run began with. None where nothing is held out."""
        first, best = self.state.extra.get("first"), self.state.extra.get("best")
        if first is None or best is None:
            return None
        return compare(first, best, best["step"], [name for name in _WATCHED if name in best["each"]])

    def curves(self) -> bytes:
        """Rewards of training and held-out answers by update, as SVG."""
        lines = self.folder.metrics.read()
        names = {
            "proxy, training": "objective/scores",
            "proxy, held out": "eval_score",
            "judge, held out": "eval_judge",
            "gold, held out": "eval_gold",
        }
        series = [
            Series(
                name,
                [(float(line["step"]), float(line[key])) for line in lines if isinstance(line.get(key), float)],
                dots=key.startswith("eval_"),
            )
            for name, key in names.items()
        ]
        title = f"{self.folder.path.name}: rewards"
        return draw_chart([one for one in series if one.points], title, "update", "mean reward of an answer").encode()

    def card(self, losses: dict[str, float | None], step: int) -> str:
        """Text of README.md: what was measured of the exported weights, and before."""
        table: dict[str, float | None] = {}
        for key, when in (("first", "before"), ("best", "after")):
            figures = self.state.extra.get(key, {}).get("figures", {})
            for name in ("score", "judge", "gold", "kl", "eos_rate"):
                table[f"{_LABELS[name]}, {when}"] = figures.get(f"eval_{name}")
        return super().card(table, step)

    def best_in_words(self, loss: float) -> str:
        """By what the exported weights are the best."""
        what = {"objective": "reward less KL", "judge": "score by the judge", "gold": "gold score"}[self.export_by]
        return f"the best {what} on held-out prompts ({-loss:.4f})"


def require_best_of_n(config: OnlineConfig, setup: Setup, display: Display) -> Verdict | None:
    """Before a policy is trained against a reward: the reward's favourite among some answers must please somebody whom the reward does
    not know (:mod:`ingot.training.gates`). None where nobody watches, nothing is held out, or ``config.gate_answers`` is 0.

    Raises
    ------
    RunError
        It does not, and ``config.force`` is not set.
    """
    prompts, watcher = setup.prompts.held_out_sample(_GATE_PROMPTS), setup.scorers.watcher
    if not config.gate_answers or not prompts:
        return None
    if watcher is None:
        display.say(
            "gate      nobody but the reward will judge this run: give --judge or --gold to see whether it is gamed"
        )
        return None
    experience = gather(
        setup,
        prompts,
        policy=setup.policy,
        num_generations=config.gate_answers,
        first_episode=0,
        seed=mix(config.seed, _GATE_STREAM),
        progress=lambda done, total: display.work("judging the best of n", done, total),
    )
    scores = experience.scores
    judged = scores.gold if watcher == "gold" else scores.judge
    assert judged is not None
    shape = (len(prompts), config.gate_answers)
    verdict = gate_verdict(
        best_of_n(scores.total.reshape(shape), judged.reshape(shape)), reward=setup.scorers.name, judge=watcher
    )
    if verdict.passed:
        display.say(f"gate      passed: {verdict.text}")
    elif config.force:
        display.say(f"gate      did not pass, going on by force: {verdict.text}")
    else:
        raise RunError(f"best of {config.gate_answers} did not pass: {verdict.text} (--force goes on all the same)")
    return verdict


def compare(first: Mapping[str, Any], best: Mapping[str, Any], step: int, watched: Sequence[str]) -> Verdict:
    """Held-out answers of two policies to the same prompts, in words.

    It passes where what counts (gold where it is known, else the judge, else the proxy) has risen beyond chance (95 % of the paired
    differences' mean), answers end as often as before (not more than 5 points less), and are at least half as diverse.
    """
    sentences: list[str] = []
    figures: dict[str, float] = {"step": step}
    risen: dict[str, bool] = {}
    for name in watched:
        change = _change(first["each"][name], best["each"][name])
        before, after = first["figures"][f"eval_{name}"], best["figures"][f"eval_{name}"]
        risen[name] = change.low > 0
        sentences.append(
            f"{_LABELS[name]} went from {before:.3f} to {after:.3f} on {len(best['each'][name])} held-out prompts "
            f"(change {change.value:+.3f} ± {change.margin:.3f})"
        )
        figures |= {
            f"{name}_before": before,
            f"{name}_after": after,
            f"{name}_change": change.value,
            f"{name}_margin": change.margin,
        }
    for name, words in (
        ("kl", "KL {0:z.2f} nats an answer"),
        ("eos_rate", ""),
        ("mean_length", ""),
        ("distinct_2", ""),
    ):
        figures |= {
            f"{name}_before": first["figures"][f"eval_{name}"],
            f"{name}_after": best["figures"][f"eval_{name}"],
        }
        if words:
            sentences.append(words.format(figures[f"{name}_after"]))
    sentences.append(
        f"answers ended by themselves {100 * figures['eos_rate_before']:.0f} % of the time before and {100 * figures['eos_rate_after']:.0f} % after; "
        f"they have {figures['mean_length_before']:.1f} and {figures['mean_length_after']:.1f} tokens; "
        f"distinct-2 {figures['distinct_2_before']:.2f} and {figures['distinct_2_after']:.2f}"
    )
    counts = watched[-1]
    ends = figures["eos_rate_after"] >= figures["eos_rate_before"] - 0.05
    diverse = figures["distinct_2_after"] >= 0.5 * figures["distinct_2_before"]
    advice = []
    if not risen[counts]:
        others = [name for name in watched if name != counts and risen[name]]
        advice.append(
            f"the {counts} did not rise although the proxy did: the reward is being gamed; give the KL more weight, take a better reward model, or stop earlier"
            if others
            else f"the {_LABELS[counts]} did not rise: train longer or with a higher --learning-rate, and look at whether best of n gains anything"
        )
    if not ends:
        advice.append("answers end less often: raise --missing-eos-penalty or the answers' length")
    if not diverse:
        advice.append("answers became alike: give the KL more weight or lower --learning-rate")
    return Verdict(
        passed=risen[counts] and ends and diverse,
        sentences=tuple(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences),
        figures=figures,
        advice=". ".join(f"{each[0].upper()}{each[1:]}" for each in advice) + ("." if advice else ""),
    )


def _change(before: Sequence[float | None], after: Sequence[float | None]) -> Mean:
    """Mean of the paired differences, 0 of none; prompts where either has no score are left out."""
    differences = [y - x for x, y in zip(before, after, strict=True) if x is not None and y is not None]
    return mean_of(differences) if differences else Mean(0.0, math.inf)


def _plain(values: Float64) -> list[float | None]:
    """As JSON has them: no NaN."""
    return [float(value) if math.isfinite(value) else None for value in values.tolist()]


def _in_words(found: Mapping[str, float]) -> str:
    shown_names: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("eval_score", "proxy", "{:.3f}".format),
        ("eval_judge", "judge", "{:.3f}".format),
        ("eval_gold", "gold", "{:.3f}".format),
        ("eval_kl", "KL", "{:z.2f}".format),
        ("eval_eos_rate", "ended", lambda share: f"{100 * share:.0f} %"),
        ("eval_mean_length", "length", "{:.1f}".format),
    )
    return "held out: " + "  ".join(
        f"{words} {form(found[name])}" for name, words, form in shown_names if name in found
    )


def _times(seconds: Mapping[str, float], took_s: float, num_episodes: int) -> dict[str, float]:
    """Where the time of an update went."""
    parts = {**seconds, "training": max(0.0, took_s - sum(seconds.values()))}
    return {
        **{f"time/{name}_s": value for name, value in parts.items()},
        **{f"time/share_{name}": value / took_s for name, value in parts.items()},
        "time/episodes_per_s": num_episodes / took_s,
    }
