"""The whole path on the small world: raw text in, an aligned model out, each stage measured.

Every stage is one of ingot's commands on ordinary files in the demo's folder, so that each can be looked at, repeated and gone on with.
What is done is kept in stages.json: the same command after an interruption goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

import ingot
from ingot import world
from ingot.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from ingot.data.files import json_line
from ingot.demo import DemoConfig
from ingot.demo.pretraining import pretrain_stage, share_of
from ingot.demo.requests import (
    asked_by,
    conversation,
    demonstrations,
    held_out_requests,
    label_by_hand,
    labeler,
    merit,
    prompts,
    quality,
)
from ingot.demo.responses import Responses, respond
from ingot.demo.story import STAGES as STORY
from ingot.demo.story import draw_story
from ingot.durable import write_file
from ingot.environment import cpu_name
from ingot.errors import RunError
from ingot.feedback.candidates import read_candidates
from ingot.feedback.records import Record, to_row
from ingot.feedback.simulate import simulate_judgements
from ingot.feedback.texts import plain
from ingot.inference.intervals import mean_of
from ingot.inference.prompts import PromptEncoder
from ingot.inference.sample import sample_candidates
from ingot.inference.scoring import RewardModel
from ingot.training.gates import best_of_n, gate_verdict
from ingot.training.metrics import MetricsLog
from ingot.training.progress import make_display
from ingot.training.runs import RUN_FILE
from ingot.training.verdicts import read_verdict

if TYPE_CHECKING:
    from ingot.models.base import Model

NOISE = 0.2
"""Share of the simulated labeller's rankings that are turned round."""
NUM_RESPONSES = 4
"""To each prompt that is ranked."""
STAGES_FILE = "stages.json"
BUDGETS_S = {
    "pretrain": 180.0,
    "sft": 60.0,
    "responses": 30.0,
    "rankings": 5.0,
    "reward": 100.0,
    "best_of_n": 15.0,
    "ppo": 150.0,
    "dpo": 40.0,
}
"""What each stage may take at full size on two cores."""
TARGETS: dict[str, tuple[str, float]] = {
    "reward_accuracy": (">=", 0.90),
    "preferred_before": ("<=", 0.60),
    "preferred_after": (">=", 0.90),
    "follows_prompt_change": (">=", -0.03),
    "well_formed_change": (">=", -0.03),
    "diversity_after": (">=", 0.5),
}
"""What the whole demo reaches. Changes: lower end of the 95 % interval of paired differences; diversity: as a share of that before."""
_MAX_NEW_TOKENS = 100
_AGAIN = 1_000
"""Added to the seed for a second answer to the same request."""
_CHECKED, _BEST_OF = 300, 16
_SHOWN = 4
# Of the settings, those that a demo that goes on must have begun with.
_FIXED = ("recipe", "seed", "max_steps", "num_samples", "num_requests", "label")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything; all of it shrinks together where the demo is cut short."""

    demonstrations: int = 20_000
    """Stories to fine-tune on."""
    prompts: int = 2500
    """Requests whose answers are ranked, and that PPO practises on."""
    updates: int = 80
    """Of PPO."""

    def times(self, share: float) -> Sizes:
        """Smaller by this factor, but never too small to run."""
        return Sizes(
            demonstrations=max(60, round(share * self.demonstrations)),
            prompts=max(40, round(share * self.prompts)),
            updates=max(2, round(share * self.updates)),
        )


def run_course(config: DemoConfig) -> dict[str, Any]:
    """See :func:`ingot.demo.run`."""
    console = Console(quiet=config.json, highlight=False)
    if config.dry_run or config.stages == "pretrain":
        report = pretrain_stage(config, console)
    else:
        report = _Course(config, console).run()
    if config.json and report:
        # The one thing that this command prints then.
        print(json.dumps(report, indent=1, ensure_ascii=False))  # noqa: T201
    return report


class _Course:
    """The stages in turn."""

    def __init__(self, config: DemoConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self.folder = Path(config.output)
        self.sizes = Sizes().times(share_of(config))
        self.place: dict[str, Any] = {"threads": config.threads, "level": config.level}
        self.done: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """All stages that are not done yet, then the figures and the report."""
        began = time.perf_counter()
        self.done = self.open()
        works: dict[str, Callable[[], dict[str, Any]]] = {
            "pretrain": self.pretrain,
            "sft": self.fine_tune,
            "responses": self.sample,
            "rankings": self.rank,
            "reward": self.train_reward_model,
            "best_of_n": self.check,
            "ppo": self.ppo,
            "dpo": self.dpo,
        }
        for number, (name, work) in enumerate(works.items(), 1):
            self.console.rule(f"[bold]{number} of {len(works)}  {STORY[name].title}", align="left")
            if name in self.done:
                self.console.print("done before\n")
                continue
            self.console.print(f"{STORY[name].in_a_word} {STORY[name].went_in}\n", soft_wrap=False)
            start = time.perf_counter()
            facts = work()
            facts = {"elapsed_s": time.perf_counter() - start, **facts}
            self.keep(name, facts)
            self.console.print(f"[dim]{facts['elapsed_s']:.0f} s of a budget of {BUDGETS_S[name]:.0f} s[/]\n")
        content = json.dumps(self.measure() | {"total_s": time.perf_counter() - began}, indent=1, ensure_ascii=False)
        write_file(self.folder / "report.json", content.encode() + b"\n")
        # What stages say in tuples, the file has as lists.
        report: dict[str, Any] = json.loads(content)
        write_file(self.folder / "report.html", draw_story(report).encode("utf-8", "replace"))
        self.summarise(report)
        return report

    # ---- stages

    def pretrain(self) -> dict[str, Any]:
        """Raw text -> a model that continues it. It has a report of its own."""
        report = pretrain_stage(dataclasses.replace(self.config, output=self.at("pretrain")), self.console)
        figures = {"num_tokens": report["tokens"], "num_parameters": report["num_parameters"], "steps": report["steps"]}
        figures |= {"true_entropy": report["true_entropy"], "gap": report["gap"]}
        figures |= {"well_formed_sentences": report["well_formed"]}
        figures["follows_prompt"] = report["follows_request"]["all"]
        samples = [
            {"prompt": sample["prompt"], "answers": [{"label": "continues", "text": sample["story"], "facts": {}}]}
            for sample in report["samples"][:2]
        ]
        return {"elapsed_s": report["elapsed_s"], "figures": figures, "samples": samples}

    def fine_tune(self) -> dict[str, Any]:
        """Demonstrations -> a model that answers, and stops."""
        rows = self.write("demonstrations.jsonl", demonstrations(self.config.seed, self.sizes.demonstrations))
        config = SFTConfig(
            model=self.at("pretrain"),
            data=(rows,),
            output=self.at("sft"),
            num_train_epochs=1,
            learning_rate=1.5e-3,
            sample_prompts=2,
            sample_tokens=_MAX_NEW_TOKENS,
            seed=self.config.seed,
            **self.place,
        )
        self.phase("sft", lambda: ingot.sft(config, quiet=self.config.json))
        told = self.told("sft")
        return {**told, "figures": {"num_demonstrations": self.sizes.demonstrations, **told["figures"]}}

    def sample(self) -> dict[str, Any]:
        """Requests -> several answers to each."""
        rows = self.write("prompts.jsonl", prompts(self.config.seed, self.sizes.prompts))
        result = sample_candidates(
            [self.at("sft")],
            rows,
            self.at("candidates.jsonl"),
            num_generations=NUM_RESPONSES,
            max_new_tokens=_MAX_NEW_TOKENS,
            seed=self.config.seed,
            threads=self.config.threads,
            display=make_display(quiet=self.config.json),
        )
        if result.interrupted:
            raise KeyboardInterrupt
        first = read_candidates(self.at("candidates.jsonl")).groups[0]
        answers = [
            {"label": str(place), "text": plain(response), "facts": {}}
            for place, response in enumerate(first.responses, 1)
        ]
        return {
            "figures": {"num_prompts": result.num_prompts, "num_responses": NUM_RESPONSES * result.num_prompts},
            "samples": [{"prompt": asked_by(first.prompt), "answers": answers}],
        }

    def rank(self) -> dict[str, Any]:
        """Candidates -> rankings: by the world's rule with noise, or by the person at the keyboard."""
        if self.config.label == "me":
            count = label_by_hand(
                self.at("candidates.jsonl"), self.at("rankings.jsonl"), self.console, self.config.seed
            )
            return {"figures": {"num_rankings": count}}
        groups = read_candidates(self.at("candidates.jsonl")).groups
        records = simulate_judgements(groups, labeler(self.config.seed, NOISE))
        self.write("rankings.jsonl", map(to_row, records))
        turned = [is_turned_round(record) for record in records]
        self.console.print(f"{len(records):,} rankings, {sum(turned):,} of them turned round")
        # One of each sort, for the page.
        shown = [records[turned.index(sort)] for sort in (False, True) if sort in turned]
        return {
            "figures": {"num_rankings": len(records), "noise": NOISE, "flipped": sum(turned) / len(records)},
            "samples": [ranking_sample(record) for record in shown],
        }

    def train_reward_model(self) -> dict[str, Any]:
        """Rankings -> a model that scores."""
        config = RewardConfig(
            model=self.at("sft"),
            data=(self.at("rankings.jsonl"),),
            output=self.at("reward"),
            # Small steps: the taste of readers is found late, and not at all at 1e-3.
            learning_rate=6e-4,
            per_device_train_batch_size=8,
            num_train_epochs=4,
            seed=self.config.seed,
            **self.place,
        )
        self.phase("reward", lambda: ingot.train_reward_model(config, force=True, quiet=self.config.json))
        return self.told("reward")

    def check(self) -> dict[str, Any]:
        """Does picking by the score give better answers, judged by the rule?"""
        requests = held_out_requests(self.config.seed, min(_CHECKED, self.config.num_requests))
        model, encoder = self.load("sft")
        found = respond(model, encoder, [each for each in requests for _ in range(_BEST_OF)], seed=self.config.seed)
        judge = RewardModel.load(self.at("reward"), threads=self.config.threads)
        asked = [conversation(request) for request in found.requests]
        scores = judge.score_tokens(found.rollouts.tokens, found.rollouts.offsets).reshape(-1, _BEST_OF)
        merits = np.array([merit(prompt, text) for prompt, text in zip(asked, found.texts, strict=True)])
        best = best_of_n(scores, merits.reshape(-1, _BEST_OF))
        verdict = gate_verdict(best, reward="the reward model", judge="the world's rule")
        self.console.print(verdict.text)
        points = [[n, float(value)] for n, value in enumerate(best.judge, 1)]
        chart = {
            "title": "What the best of n is worth",
            "x_title": "answers to choose from",
            "y_title": "merit by the rule, 0 to 2",
            "read": "The higher the line climbs, the better the reward model chooses.",
            "series": [{"name": "merit of the choice", "points": points}],
        }
        figures = {"n": _BEST_OF, "gain": best.gain, "gain_low": best.interval[0], "gain_high": best.interval[1]}
        return {"figures": figures, "verdict": dataclasses.asdict(verdict), "charts": [chart]}

    def ppo(self) -> dict[str, Any]:
        """Requests and the reward model -> a policy whose answers score better."""
        config = PPOConfig(
            model=self.at("sft"),
            reward_model=self.at("reward"),
            prompts=(self.at("prompts.jsonl"),),
            output=self.at("ppo"),
            gold=f"{merit.__module__}.reward",
            export_by="last",
            # The stage before has done it, and shows it.
            gate_answers=0,
            response_length=_MAX_NEW_TOKENS,
            max_steps=self.sizes.updates,
            per_device_train_batch_size=128,
            num_ppo_epochs=2,
            num_mini_batches=2,
            learning_rate=5e-4,
            # The reward model knows already what is good, and so in the middle of a story what is to be expected.
            critic="reward_model",
            critic_learning_rate=5e-4,
            lam=0.9,
            # With 0.05 the policy finds what only the reward model likes.
            kl_coef=0.15,
            # A demo that is cut short passes no gate, and shows the rest all the same.
            force=True,
            seed=self.config.seed,
            **self.place,
        )
        self.phase("ppo", lambda: ingot.ppo(config, quiet=self.config.json))
        return self.told("ppo")

    def dpo(self) -> dict[str, Any]:
        """The same rankings -> a policy, directly."""
        config = DPOConfig(
            model=self.at("sft"),
            data=(self.at("rankings.jsonl"),),
            output=self.at("dpo"),
            beta=0.3,
            learning_rate=3e-4,
            per_device_train_batch_size=16,
            num_train_epochs=1,
            seed=self.config.seed,
            **self.place,
        )
        self.phase("dpo", lambda: ingot.dpo(config, force=True, quiet=self.config.json))
        return self.told("dpo")

    # ---- what stages share

    def at(self, name: str) -> str:
        """Something in the demo's folder."""
        return str(self.folder / name)

    def write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> str:
        """A file of rows; its path."""
        write_file(self.folder / name, b"".join(json_line(dict(row)) for row in rows))
        return self.at(name)

    def phase(self, name: str, start: Callable[[], Any]) -> Any:
        """Begin a run, or go on with one that was interrupted."""
        facts = self.folder / name / RUN_FILE
        if not facts.is_file():
            return start()
        if json.loads(facts.read_bytes())["finished"]:
            # Interrupted after its last step, before it was noted down.
            return None
        return ingot.resume(self.folder / name, quiet=self.config.json)

    def load(self, name: str) -> tuple[Model, PromptEncoder]:
        """The model that a stage ended with."""
        model = ingot.load_model(self.at(name), **self.place)
        return model, PromptEncoder(self.at(name), ingot.Tokenizer.from_file(self.at(name)))

    def respond(self, name: str, requests: Sequence[world.Request], seed: int) -> Responses:
        """What it answers."""
        self.console.print(f"{name}: {len(requests):,} stories ...")
        return respond(*self.load(name), requests, seed=seed)

    def told(self, name: str) -> dict[str, Any]:
        """What a run says about itself, for the page."""
        verdict = read_verdict(self.folder / name)
        history = MetricsLog(self.folder / name / "metrics.jsonl").read()
        facts: dict[str, Any] = {"figures": {"steps": history[-1]["step"]}, "folder": self.at(name)}
        return facts if verdict is None else {**facts, "verdict": dataclasses.asdict(verdict)}

    # ---- the end

    def measure(self) -> dict[str, Any]:
        """The content of report.json: the same held-out requests, with the same random numbers, for each policy."""
        config = self.config
        self.console.rule("[bold]What came of it", align="left")
        requests = held_out_requests(config.seed, config.num_requests)
        before = self.respond("sft", requests, config.seed)
        again = self.respond("sft", requests, config.seed + _AGAIN)
        after = {name: self.respond(name, requests, config.seed) for name in ("ppo", "dpo")}
        judge = RewardModel.load(self.at("reward"), threads=config.threads)
        sft, _ = self.load("sft")
        report: dict[str, Any] = {"reward_accuracy": pair_accuracy(judge, before, again)}
        report |= {f"{name}_before": value for name, value in before.figures().items()}
        for name, responses in after.items():
            facts: dict[str, Any] = {f"{figure}_after": value for figure, value in responses.figures().items()}
            facts["kl"] = responses.divergence(sft)
            facts["changes"] = changes(before, responses)
            report |= facts if name == "ppo" else {"dpo": {**facts, "elapsed_s": self.done["dpo"]["elapsed_s"]}}
        info = ingot.build_info(threads=config.threads)
        return {
            **report,
            "targets": verdicts(report),
            "elapsed_s": sum(stage["elapsed_s"] for stage in self.done.values()),
            "num_held_out": len(requests),
            "temperature": 1.0,
            "seed": config.seed,
            "noise": NOISE if config.label == "rule" else None,
            "labeler": config.label,
            "num_parameters": sft.num_parameters,
            "recipe": config.recipe,
            "machine": {"cpu": cpu_name(), **{name: info[name] for name in ("level", "threads", "version")}},
            "stages": [self.stage(name) for name in self.done],
            "samples": samples([("fine-tuned", before), ("PPO", after["ppo"]), ("DPO", after["dpo"])]),
        }

    def stage(self, name: str) -> dict[str, Any]:
        """A stage as the page tells it, with the curves of its run."""
        log = MetricsLog(self.folder / name / "metrics.jsonl")
        return {"name": name, "budget_s": BUDGETS_S[name], "history": log.read(), **self.done[name]}

    def summarise(self, report: Mapping[str, Any]) -> None:
        """The figures in the terminal."""
        table = Table(title=f"{report['num_held_out']:,} requests that no training text had, at temperature 1")
        for column in ("", "fine-tuned", "PPO", "DPO"):
            table.add_column(column, justify="left" if not column else "right")
        rows = (
            ("please their reader", "preferred", "{:.1%}"),
            ("do all that was asked", "follows_prompt", "{:.1%}"),
            ("well-formed", "well_formed", "{:.1%}"),
            ("different from each other", "distinct", "{:.1%}"),
            ("diversity, nats a story", "diversity", "{:.1f}"),
            ("length, tokens", "length", "{:.1f}"),
        )
        for label, name, shown in rows:
            values = (report[f"{name}_before"], report[f"{name}_after"], report["dpo"][f"{name}_after"])
            table.add_row(label, *(shown.format(value) for value in values))
        table.add_row("distance from fine-tuned, nats a story", "", f"{report['kl']:.2f}", f"{report['dpo']['kl']:.2f}")
        self.console.print(table)
        if report["reward_accuracy"] is not None:
            self.console.print(
                f"The reward model orders {report['reward_accuracy']:.1%} of held-out pairs as the rule does."
            )
        for sample in report["samples"][:2]:
            self.console.print(f"\n[bold]{sample['prompt']}[/]")
            for answer in sample["answers"]:
                mark = "[green]pleases[/]" if answer["facts"]["pleases"] else "[red]does not please[/]"
                self.console.print(f"  {answer['label']}: {answer['text']} ({mark})")
        missed = [name for name, target in report["targets"].items() if not target["met"]]
        self.console.print(f"\nMissed: {', '.join(missed)}." if missed else "\nEvery target is met.")
        spent = "  ".join(f"{name} {stage['elapsed_s']:.0f}" for name, stage in self.done.items())
        self.console.print(f"Seconds: {spent}; {report['elapsed_s']:.0f} in all.")
        self.console.print(f"The whole story: {self.folder / 'report.html'}")
        self.console.print(f"Try: ingot chat {self.folder / 'ppo'}", soft_wrap=True)

    # ---- going on after an interruption

    def open(self) -> dict[str, dict[str, Any]]:
        """The stages that are done, where the demo was interrupted in this folder.

        Raises
        ------
        RunError
            The folder holds a demo of other settings, or something else.
        """
        path = self.folder / STAGES_FILE
        if not path.exists():
            others = sorted(entry.name for entry in self.folder.iterdir()) if self.folder.is_dir() else []
            if others:
                raise RunError(
                    f"{self.folder}: holds other files ({', '.join(others[:3])}); choose an empty or new folder as --output"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self.save({})
            return {}
        try:
            saved = json.loads(path.read_bytes())
            known, done = dict(saved["settings"]), dict(saved["stages"])
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{path}: damaged, cannot be read; choose another --output") from None
        for name, value in self.settings().items():
            if known.get(name) != value:
                raise RunError(
                    f"{self.folder}: holds a demo with {name} {known.get(name)}, not {value}; choose another --output"
                )
        return done

    def settings(self) -> dict[str, Any]:
        """What a demo that goes on must have begun with."""
        return {name: getattr(self.config, name) for name in _FIXED}

    def keep(self, name: str, facts: dict[str, Any]) -> None:
        """Note that a stage is done."""
        self.done[name] = facts
        self.save(self.done)

    def save(self, done: Mapping[str, Any]) -> None:
        """Write stages.json."""
        content = json.dumps({"settings": self.settings(), "stages": done}, indent=1, ensure_ascii=False)
        write_file(self.folder / STAGES_FILE, content.encode() + b"\n")


def is_turned_round(record: Record) -> bool:
    """Whether a ranking puts a better answer behind a worse one."""
    merits = [quality(record.prompt, response) for response in record.responses]
    ranks = record.ranks or ()
    return any(merits[a] > merits[b] and ranks[a] > ranks[b] for a in range(len(ranks)) for b in range(len(ranks)))


def ranking_sample(record: Record) -> dict[str, Any]:
    """A ranking as the page shows it."""
    turned = is_turned_round(record)
    return {
        "prompt": asked_by(record.prompt),
        "answers": [
            {
                "label": str(place),
                "text": plain(response),
                "facts": {"rank": rank, "true": merit(record.prompt, response), "turned": turned},
            }
            for place, (response, rank) in enumerate(zip(record.responses, record.ranks or (), strict=True), 1)
        ],
    }


def pair_accuracy(judge: RewardModel, a: Responses, b: Responses) -> float | None:
    """Share of pairs of answers to the same request, of which the rule likes one better, in which the judge scores that one higher.

    None where the rule likes none better."""
    prompts = [conversation(request) for request in a.requests]
    merits = np.array(
        [[merit(prompt, text) for prompt, text in zip(prompts, each.texts, strict=True)] for each in (a, b)]
    )  # f64 [2, R]
    scores = np.array([judge.score_tokens(each.rollouts.tokens, each.rollouts.offsets) for each in (a, b)])
    better, higher = np.sign(merits[0] - merits[1]), np.sign(scores[0] - scores[1])
    untied = better != 0
    return float((better == higher)[untied].mean()) if untied.any() else None


def changes(before: Responses, after: Responses) -> dict[str, dict[str, float]]:
    """Paired changes with their intervals, by the names of the report."""
    pairs = {
        "preferred": (before.pleases, after.pleases),
        "follows_prompt": (before.follows, after.follows),
        "well_formed": (before.well_formed, after.well_formed),
    }
    found = {name: mean_of(after - before) for name, (before, after) in pairs.items()}
    return {name: {"mean": each.value, "low": each.low, "high": each.high} for name, each in found.items()}


def verdicts(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each target: what was wanted, what was reached, and whether that is enough."""
    reached = {
        **report,
        "follows_prompt_change": report["changes"]["follows_prompt"]["low"],
        "well_formed_change": report["changes"]["well_formed"]["low"],
        "diversity_after": report["diversity_after"] / report["diversity_before"],
    }
    return {
        name: {
            "wanted": f"{relation} {bound:.2f}" + (" of before" if name == "diversity_after" else ""),
            "reached": reached[name],
            "met": reached[name] is not None
            and bool(reached[name] >= bound if relation == ">=" else reached[name] <= bound),
        }
        for name, (relation, bound) in TARGETS.items()
    }


def samples(policies: Sequence[tuple[str, Responses]]) -> list[dict[str, Any]]:
    """The first requests, with what each policy answered."""
    return [
        {
            "prompt": request.text,
            "answers": [
                {
                    "label": label,
                    "text": each.texts[number],
                    "facts": {
                        "pleases": bool(each.pleases[number]),
                        "follows": bool(each.follows[number]),
                        "well_formed": bool(each.well_formed[number]),
                    },
                }
                for label, each in policies
            ],
        }
        for number, request in enumerate(policies[0][1].requests[:_SHOWN])
    ]
