"""The demo's first stage: text, training with looks at the model on the way, final figures and a report of its own."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import ingot
from ingot import world
from ingot.configs import PretrainConfig, load_recipe
from ingot.data.corpus import Corpus
from ingot.demo import DemoConfig
from ingot.demo.measure import Sample, answer, figures, read, write
from ingot.demo.page import draw_page
from ingot.durable import write_file
from ingot.environment import cpu_name
from ingot.training.callbacks import Callback, RunView
from ingot.training.metrics import MetricsLog
from ingot.training.pretrain import pretrain, resume
from ingot.training.runs import RUN_FILE

if TYPE_CHECKING:
    from ingot.models.base import Model
    from ingot.tokenizer import Tokenizer

TARGETS: dict[str, dict[str, tuple[str, float]]] = {
    "world": {
        "well_formed": (">=", 0.95),
        "distinct": (">=", 0.99),
        "follows_request": (">=", 0.90),
        "gap": ("<=", 0.10),
    },
    "world-long": {
        "well_formed": (">=", 0.95),
        "distinct": (">=", 0.99),
        "follows_request": (">=", 0.90),
        "gap": ("<=", 0.03),
        "question_accuracy": (">=", 0.90),
    },
}
"""What a whole run of a recipe reaches; ``follows_request`` is that of the weakest of who, where and ending."""


@dataclasses.dataclass(frozen=True)
class Exercises:
    """How much a recipe practises keeping track of who is where (:func:`ingot.world.exercises`)."""

    before: float
    """Share of its tokens that are exercises read before the first story."""
    every: int
    """From then on one exercise follows so many stories: what is not asked for any more is soon forgotten."""


EXERCISES = {"world-long": Exercises(before=0.35, every=3)}

_ASKED = ("who", "where", "ending")
_MAX_DOCUMENTS = 250_000
_MIN_DOCUMENTS = 2000
_LEAST_TOKENS_PER_DOCUMENT = 85
_TOKENS_PER_EXERCISE = 106
_LOOK_DOCUMENTS = 100
"""Size of a look on the way."""
_SHOWN = 4
_BASELINE_DOCUMENTS = 20_000


def pretrain_stage(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Pretrain in ``config.output``, measure, and write report.json and report.html there.

    Returns
    -------
    dict
        The content of report.json; empty for a dry run.
    """
    began = time.perf_counter()
    settings = _settings(config)
    assert settings.max_steps is not None
    console.print(
        "A small world of people, things and places: short stories that do what their first line asks, made by a grammar "
        "that knows the probability of each of them. The model sees the text alone, and half of all combinations of "
        "person, thing and place are kept from it: all that follows is measured on those.\n"
    )
    training = list(world.documents(config.seed, "train", num_documents(settings)))
    held_out = list(world.documents(config.seed, "held_out", config.num_samples))
    texts = [document.text for document in training]
    practice = EXERCISES.get(config.recipe)
    num_first = 0
    if practice is not None:
        num_first = num_exercises(settings, practice.before)
        exercises = list(world.exercises(config.seed, num_first + len(texts) // practice.every))
        texts = [*exercises[:num_first], *interleaved(texts, exercises[num_first:], practice.every)]
        console.print(
            f"First come {num_first} exercises in keeping track of who is where, then one after every {practice.every} stories: what they "
            "teach, the stories take for granted.\n"
        )
    corpus = Corpus.from_documents(texts)
    if config.dry_run:
        pretrain(settings, corpus, dry_run=True, quiet=config.json)
        return {}
    folder = Path(settings.output)
    look = _Look(folder, held_out, config, console)
    if (folder / RUN_FILE).is_file():
        model, tokenizer = _go_on(folder, corpus, look, config)
    else:
        result = pretrain(settings, corpus, [look], quiet=config.json)
        model, tokenizer = result.model, result.tokenizer

    console.print(f"\nThe finished model writes {config.num_samples} stories and reads as many held-out ones ...")
    requests = [document.story.request for document in held_out]
    reading = read(model, tokenizer, held_out)
    samples = write(model, tokenizer, requests, seed=config.seed)
    final = figures(reading, samples, {document.story.text for document in training})
    accuracy = final.pop("question_accuracy")
    report = {
        **final,
        "questions": {
            "accuracy": accuracy,
            "baselines": world.baselines(training[:_BASELINE_DOCUMENTS], held_out),
        },
        "temperature": 1.0,
        "num_samples": config.num_samples,
        "targets": verdicts(config.recipe, {**final, "question_accuracy": accuracy}),
        "recipe": config.recipe,
        "seed": config.seed,
        "steps": settings.max_steps,
        "exercises": num_first,
        "tokens": look.tokens,
        "num_parameters": model.num_parameters,
        "elapsed_s": look.trained_s,
        "total_s": time.perf_counter() - began,
        "machine": {
            "cpu": cpu_name(),
            **{name: ingot.build_info(threads=config.threads)[name] for name in ("level", "threads", "version")},
        },
        "before": look.history[0],
        "history": look.history,
        "samples": [_sample_facts(sample) for sample in samples[:20]],
    }
    answers = [(document, answer(model, tokenizer, document)) for document in held_out[:3]]
    write_file(folder / "report.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    write_file(folder / "report.html", draw_page(report, look.samples, samples[:_SHOWN], answers).encode())
    _summarise(console, report, samples[:_SHOWN], folder)
    return report


def share_of(config: DemoConfig) -> float:
    """How far the demo is cut short, from 0 to 1: the steps that it takes beside those of its recipe."""
    whole = load_recipe(config.recipe)["max_steps"]
    return 1.0 if config.max_steps is None else min(1.0, config.max_steps / whole)


def num_documents(settings: PretrainConfig) -> int:
    """Enough for a run that sees no document twice, up to a limit beyond which repetition does no harm."""
    return min(_MAX_DOCUMENTS, max(_MIN_DOCUMENTS, _most_tokens(settings) // _LEAST_TOKENS_PER_DOCUMENT))


def interleaved(stories: Sequence[str], exercises: Sequence[str], every: int) -> list[str]:
    """All of both in their order: after every ``every`` stories an exercise, as long as there are some."""
    texts: list[str] = []
    for number, story in enumerate(stories):
        texts.append(story)
        if number % every == every - 1 and number // every < len(exercises):
            texts.append(exercises[number // every])
    return texts


def num_exercises(settings: PretrainConfig, share: float) -> int:
    """So many that they are about this share of what a run reads."""
    return int(share * _most_tokens(settings) / _TOKENS_PER_EXERCISE)


def _most_tokens(settings: PretrainConfig) -> int:
    """What the run reads if every row is full."""
    assert settings.max_steps is not None
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    return settings.max_steps * rows * settings.sequence_length


def verdicts(recipe: str, final: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each target of the recipe: what was wanted, what was reached, and whether that is enough."""
    reached = {**final, "follows_request": min(final["follows_request"][aspect] for aspect in _ASKED)}
    return {
        name: {
            "wanted": f"{relation} {bound:.2f}",
            "reached": reached[name],
            "met": reached[name] >= bound if relation == ">=" else reached[name] <= bound,
        }
        for name, (relation, bound) in TARGETS[recipe].items()
    }


def _go_on(folder: Path, corpus: Corpus, look: _Look, config: DemoConfig) -> tuple[Model, Tokenizer]:
    """The finished model of a run that was interrupted, or whose report is not written yet."""
    if json.loads((folder / RUN_FILE).read_bytes())["finished"]:
        look.recall(None)
        place: dict[str, Any] = {"threads": config.threads, "level": config.level}
        return ingot.load_model(folder, **place), ingot.Tokenizer.from_file(folder)
    result = resume(folder, data=corpus, callbacks=[look], quiet=config.json)
    return result.model, result.tokenizer


class _Look(Callback):
    """Measures the model before, during and after training, and shows how its stories change. What it saw is kept in looks.jsonl."""

    def __init__(self, folder: Path, held_out: Sequence[world.Document], config: DemoConfig, console: Console) -> None:
        self._log = MetricsLog(folder / "looks.jsonl")
        self._documents = held_out[:_LOOK_DOCUMENTS]
        self._requests = [document.story.request for document in self._documents]
        self._seed = config.seed
        self._console = console
        self._resumed_at: float | None = None
        self.trained_s = 0.0
        """Seconds of training, without the looks."""
        self.tokens = 0
        self.history: list[dict[str, Any]] = []
        self.samples: list[tuple[int, list[Sample]]] = []
        """Steps, and what the model wrote then."""

    def on_start(self, run: RunView) -> None:
        self.recall(run.step)
        self._resumed_at = time.perf_counter()

    def recall(self, step: int | None) -> None:
        """What was seen before, up to ``step``; all of it where that is None."""
        kept = [line for line in self._log.read() if step is None or line["look"]["step"] <= step]
        self._log.cut(len(kept))
        self.history = [line["look"] for line in kept]
        self.samples = [
            (
                line["look"]["step"],
                [
                    Sample(request, text, world.check(text, request))
                    for request, text in zip(self._requests, line["texts"], strict=False)
                ],
            )
            for line in kept
        ]
        if kept:
            self.trained_s, self.tokens = self.history[-1]["elapsed_s"], self.history[-1]["tokens"]

    def on_evaluate(self, run: RunView, metrics: Mapping[str, Any]) -> None:
        if self._resumed_at is not None:
            self.trained_s += time.perf_counter() - self._resumed_at
        self.tokens = metrics["tokens"]
        reading = read(run.model, run.tokenizer, self._documents)
        samples = write(run.model, run.tokenizer, self._requests, seed=self._seed)
        now = figures(reading, samples, ())
        del now["copied"]
        self.history.append({"step": run.step, "tokens": self.tokens, "elapsed_s": self.trained_s, **now})
        self.samples.append((run.step, samples[:_SHOWN]))
        self._log.append({"look": self.history[-1], "texts": [sample.text for sample in samples[:_SHOWN]]})
        self._console.print(
            f"\nstep {run.step}: held-out loss {now['held_out_loss']:.3f} (true entropy {now['true_entropy']:.3f}), "
            f"well-formed {now['well_formed']:.0%}, as asked {now['follows_request']['all']:.0%}, "
            f"questions {now['question_accuracy']:.0%}"
        )
        self._console.print(_tell(samples[0]))
        self._resumed_at = time.perf_counter()


def _settings(config: DemoConfig) -> PretrainConfig:
    fields = PretrainConfig.fields_of(load_recipe(config.recipe), config.recipe)
    fields |= {"output": config.output, "seed": config.seed, "threads": config.threads, "level": config.level}
    if config.max_steps is not None:
        fields |= {"max_steps": config.max_steps, "eval_steps": None, "save_steps": None}
    # The combinations that are held out are not in the text; samples are this module's business.
    return PretrainConfig(**{**fields, "held_out": 0.0, "sample_tokens": 0})


def _sample_facts(sample: Sample) -> dict[str, Any]:
    return {"prompt": sample.request.text, "story": sample.text, "follows_request": dict(sample.check.follows)}


def _tell(sample: Sample) -> Text:
    """A sample for the terminal, with what it does and does not do of what was asked."""
    text = Text(f"  {sample.request.text}\n", style="bold")
    text.append(f"  {sample.text.strip() or '(nothing)'}\n", style="not bold")
    for aspect, done in sample.check.follows.items():
        text.append(f"  {'yes' if done else 'no '} {aspect}", style="green" if done else "red")
    return text


def _summarise(console: Console, report: Mapping[str, Any], samples: Sequence[Sample], folder: Path) -> None:
    table = Table(title="On combinations never seen in training, at temperature 1")
    for column in ("", "before", "after", "wanted"):
        table.add_column(column, justify="left" if not column else "right")
    targets = report["targets"]
    before = report["before"]
    rows: list[tuple[str, str, float, float]] = [
        ("well-formed sentences", "well_formed", before["well_formed"], report["well_formed"]),
        ("distinct stories", "distinct", before["distinct"], report["distinct"]),
    ]
    rows += [
        (f"does as asked: {aspect}", "follows_request", before["follows_request"][aspect], share)
        for aspect, share in report["follows_request"].items()
    ]
    for label, name, first, last in rows:
        asked = label.rpartition(": ")[2]
        wanted = targets[name]["wanted"] if name != "follows_request" or asked in _ASKED else ""
        table.add_row(label, f"{first:.1%}", f"{last:.1%}", wanted)
    table.add_row(
        "held-out loss, nats per token", f"{before['held_out_loss']:.3f}", f"{report['held_out_loss']:.3f}", ""
    )
    table.add_row("   above the true entropy", f"{before['gap']:.3f}", f"{report['gap']:.3f}", targets["gap"]["wanted"])
    questions = report["questions"]
    wanted = targets.get("question_accuracy", {}).get("wanted", "")
    table.add_row("questions answered", f"{before['question_accuracy']:.1%}", f"{questions['accuracy']:.1%}", wanted)
    for name, share in questions["baselines"].items():
        table.add_row(f"   by guessing: {name.replace('_', ' ')}", "", f"{share:.1%}", "")
    console.print(table)
    for sample in samples[:2]:
        console.print(_tell(sample))
    missed = [name for name, verdict in targets.items() if not verdict["met"]]
    console.print(f"\nMissed: {', '.join(missed)}." if missed else "\nEvery target is met.")
    console.print(f"Trained for {report['elapsed_s']:.0f} s. The whole story: {folder / 'report.html'}")
    request = samples[0].request.text
    console.print(f'Try: ingot generate {folder} --prompt "{request}" --temperature 1', soft_wrap=True)
