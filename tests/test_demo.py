"""The demo: what it measures, what it writes, and (in the long checks) what it reaches."""

from __future__ import annotations

import dataclasses
import html.parser
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

import ingot
from ingot import world
from ingot.cli import main
from ingot.configs import PretrainConfig, load_recipe
from ingot.data.rows import RankedList, read_rows
from ingot.demo import DemoConfig, run
from ingot.demo.course import BUDGETS_S, TARGETS
from ingot.demo.measure import Sample, read, write
from ingot.demo.page import draw_page
from ingot.demo.pretraining import EXERCISES, interleaved, num_documents, num_exercises
from ingot.demo.requests import conversation, demonstrations, merit, prompts, reward
from ingot.demo.story import STAGES as STORY
from ingot.training.trainer import Trainer
from ingot.world.vocabulary import ENDINGS, PEOPLE, PLACES, READERS, THINGS


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A run that is long enough to learn something, and short enough for a test."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    report = run(DemoConfig(output=str(folder), max_steps=40, num_samples=30, stages="pretrain"))
    return folder, report


@pytest.fixture(scope="module")
def trained(demo):
    return ingot.load_model(demo[0]), ingot.Tokenizer.from_file(demo[0])


def test_report_has_every_figure(demo):
    folder, report = demo
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report
    shares = [report[name] for name in ("well_formed", "distinct", "copied", "possible")]
    shares += [*report["follows_request"].values(), *report["questions"]["baselines"].values()]
    shares.append(report["questions"]["accuracy"])
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert set(report["follows_request"]) == {"who", "where", "thing", "ending", "all"}
    assert report["gap"] == pytest.approx(report["held_out_loss"] - report["true_entropy"])
    assert report["gap"] > 0
    assert report["seed"] == 0
    assert report["steps"] == 40
    assert 0 < report["elapsed_s"] < report["total_s"]
    assert {"cpu", "threads", "level", "version"} <= set(report["machine"])
    assert [look["step"] for look in report["history"]] == list(range(0, 41, 4))


def test_it_learns(demo):
    _, report = demo
    assert report["before"]["held_out_loss"] > 6.0
    assert report["held_out_loss"] < 2.0


def test_folder_holds_the_model(demo, capsys):
    folder, report = demo
    prompt = report["samples"][0]["prompt"] + "\n"
    assert main(["generate", str(folder), "--prompt", prompt, "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]


def test_page_needs_no_network_and_tells_the_story(demo):
    folder, report = demo
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.links == []
    assert not page.tags & {"script", "link", "iframe", "img", "object"}
    assert "url(" not in text
    assert "@import" not in text
    assert text.count("<svg") == 2
    assert f"{report['held_out_loss']:.3f}" in text
    assert "step 40" in text


def test_page_escapes_what_a_model_wrote(demo):
    _, report = demo
    document = next(world.documents(0, "held_out"))
    request = document.story.request
    evil = "<script>alert(1)</script>{{ 7 * 7 }}"
    sample = Sample(request, evil, world.check(evil, request))
    text = draw_page(report, [(0, [sample])], [sample], [(document, [evil] * 3)])
    assert "<script>" not in text
    assert text.count("&lt;script&gt;") >= 4
    assert "{{ 7 * 7 }}" in text


def test_dry_run_leaves_no_folder(tmp_path):
    assert run(DemoConfig(output=str(tmp_path / "run"), max_steps=2, dry_run=True)) == {}
    assert not (tmp_path / "run").exists()


def test_json_prints_the_report_alone(tmp_path, capsys):
    arguments = ["--max-steps", "2", "--num-samples", "3", "--json", "--seed", "4", "--stages", "pretrain"]
    assert main(["demo", "--output", str(tmp_path / "run"), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seed"] == 4
    assert report == json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "fields", [{"max_steps": 0}, {"num_samples": 0}, {"num_requests": 0}, {"seed": -1}, {"threads": 0}]
)
def test_settings_that_make_no_sense_are_named(fields):
    with pytest.raises(ingot.ConfigError, match=next(iter(fields))):
        DemoConfig(**fields)


# Measures


def test_held_out_loss_is_that_of_evaluate(trained):
    model, tokenizer = trained
    documents = list(world.documents(8, "held_out", 150))
    corpus = ingot.Corpus.from_documents([document.text for document in documents])
    evaluation = ingot.evaluate(model, tokenizer, corpus)
    reading = read(model, tokenizer, documents)
    assert reading.loss == pytest.approx(evaluation.loss, abs=1e-6)
    surprise = -sum(document.log_probability for document in documents)
    assert reading.true_entropy == pytest.approx(surprise / evaluation.num_tokens, rel=1e-12)


def test_an_answer_is_right_where_each_of_its_tokens_is(trained):
    """A model that is sure of all but chosen tokens: exactly the questions whose answers hold such a token are wrong."""
    _, tokenizer = trained
    documents = list(world.documents(8, "held_out", 100))
    wrong = [" " + document.questions[1].place for document in documents]
    number = iter(wrong)

    def forward(tokens, offsets, targets, *, want, train):
        top1 = np.ones(len(tokens), bool)
        for begin, end in itertools.pairwise(offsets):
            word = next(number)
            texts = [tokenizer.token_bytes(int(target)).decode() for target in targets[begin:end]]
            # The last mention of the place of the second question; what the story says is not asked.
            top1[begin + max(place for place, text in enumerate(texts) if text == word)] = False
        return None, SimpleNamespace(logprobs=np.full(len(tokens), -0.5, np.float32), top1=top1)

    reading = read(SimpleNamespace(forward=forward), tokenizer, documents)
    expected = []
    for document in documents:
        places = [question.place for question in document.questions]
        last = max(index for index, place in enumerate(places) if place == places[1])
        expected += [index != last for index in range(3)]
    assert reading.answered == expected
    assert reading.loss == pytest.approx(0.5)


def test_every_word_to_look_up_is_one_token(trained):
    _, tokenizer = trained
    words = [*PEOPLE, *THINGS, *PLACES, *READERS, *ENDINGS]
    assert [word for word in words if len(tokenizer.encode_ordinary(" " + word)) != 1] == []


def test_samples_do_not_depend_on_their_company(trained):
    model, tokenizer = trained
    requests = [story.request for story in world.stories(1, "held_out", 70)]
    many = write(model, tokenizer, requests, seed=5)
    assert write(model, tokenizer, requests[:3], seed=5) == many[:3]


# Recipes


@pytest.mark.parametrize("recipe", ["world", "world-long"])
def test_documents_fit_into_a_row(trained, recipe):
    _, tokenizer = trained
    settings = PretrainConfig.from_dict(load_recipe(recipe), recipe)
    longest = max(len(tokenizer.encode_ordinary(document.text)) + 1 for document in world.documents(0, "train", 5000))
    assert longest <= settings.max_length


def test_the_short_recipe_sees_no_story_twice(trained):
    _, tokenizer = trained
    settings = PretrainConfig.from_dict(load_recipe("world"), "world")
    lengths = [len(tokenizer.encode_ordinary(document.text)) + 1 for document in world.documents(0, "train", 2000)]
    read_at_most = settings.max_steps * settings.per_device_train_batch_size * settings.max_length
    assert num_documents(settings) * np.mean(lengths) > read_at_most


def test_the_long_recipe_reads_its_exercises_first_and_runs_out_of_nothing(trained):
    _, tokenizer = trained
    settings = PretrainConfig.from_dict(load_recipe("world-long"), "world-long")
    assert settings.document_order == "given"
    lengths = [len(tokenizer.encode_ordinary(text)) + 1 for text in world.exercises(0, 2000)]
    assert max(lengths) <= settings.max_length
    read_at_most = settings.max_steps * settings.per_device_train_batch_size * settings.max_length
    exercises = num_exercises(settings, EXERCISES["world-long"].before) * np.mean(lengths)
    assert exercises == pytest.approx(EXERCISES["world-long"].before * read_at_most, rel=0.05)
    documents = [len(tokenizer.encode_ordinary(document.text)) + 1 for document in world.documents(0, "train", 2000)]
    # Else the second pass would begin with the exercises again.
    assert exercises + num_documents(settings) * np.mean(documents) > read_at_most


def test_an_exercise_follows_every_few_stories():
    assert interleaved(list("abcdefgh"), ["1", "2"], 3) == list("abc1def2gh")
    assert interleaved(list("abcd"), ["1", "2"], 1) == list("a1b2cd")
    assert interleaved([], ["1"], 2) == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_target_of_the_long_recipe_is_met(tmp_path, seed):
    assert (
        missed(run(DemoConfig(output=str(tmp_path / "run"), recipe="world-long", seed=seed, stages="pretrain"))) == {}
    )


def missed(report):
    """Targets that were not met, with what was reached."""
    return {name: target for name, target in report["targets"].items() if not target["met"]}


# The whole path


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """All stages, each cut as short as it can be."""
    folder = tmp_path_factory.mktemp("demo") / "course"
    return folder, run(DemoConfig(**CUT_SHORT, output=str(folder), json=True))


CUT_SHORT = {"max_steps": 150, "num_samples": 12, "num_requests": 12}
FIGURES = ("preferred", "follows_prompt", "well_formed", "diversity")


def test_the_report_of_the_whole_path_has_every_figure(course):
    folder, report = course
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report
    for name in FIGURES:
        assert {f"{name}_before", f"{name}_after"} <= set(report)
        assert f"{name}_after" in report["dpo"]
    assert {"reward_accuracy", "kl", "elapsed_s", "total_s", "changes", "targets", "samples"} <= set(report)
    assert [stage["name"] for stage in report["stages"]] == list(BUDGETS_S)
    assert report["elapsed_s"] == pytest.approx(sum(stage["elapsed_s"] for stage in report["stages"]))
    assert report["elapsed_s"] < report["total_s"]
    assert set(report["targets"]) == set(TARGETS)
    assert report["num_held_out"] == 12


def test_each_stage_leaves_what_its_command_would(course):
    folder, _ = course
    for name in ("pretrain", "sft", "reward", "ppo", "dpo"):
        assert json.loads((folder / name / "run.json").read_text())["finished"]
    rows = {name: list(read_rows(str(folder / f"{name}.jsonl"))) for name in ("demonstrations", "prompts", "rankings")}
    assert {type(row) for row in rows["rankings"]} == {RankedList}
    assert all(len(row.responses) >= 2 for row in rows["rankings"])
    # No prompt is a request of a held-out combination.
    for row in rows["prompts"]:
        request = world.parse_request(row.prompt[-1]["content"])
        assert world.split_of(request.who, request.thing, request.place) == "train"


def test_the_page_of_the_whole_path_needs_no_network(course):
    folder, report = course
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert [link for link in page.links if not link.startswith("#")] == []
    assert not page.tags & {"link", "iframe", "img", "object"}
    for stage in report["stages"]:
        assert STORY[stage["name"]].title in text


def test_a_finished_demo_is_not_done_again_but_told_again(course, capsys):
    folder, report = course
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    again = run(DemoConfig(**CUT_SHORT, output=str(folder)))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "done before" in capsys.readouterr().out
    for name in ("preferred_after", "kl", "reward_accuracy", "elapsed_s"):
        assert again[name] == report[name]


def test_a_demo_goes_on_after_an_interruption(course, tmp_path, monkeypatch):
    """Stopped within a stage and begun again, it comes to the same figures."""
    folder, report = course
    config = DemoConfig(**CUT_SHORT, output=str(tmp_path / "run"), json=True)
    stop = {"after": 3}

    def interrupt(self, *_):
        stop["after"] -= 1
        if stop["after"] == 0:
            self.stop.requested = True

    monkeypatch.setattr(Trainer, "count", _with(Trainer.count, interrupt))
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert not json.loads((tmp_path / "run" / "pretrain" / "run.json").read_text())["finished"]
    again = run(config)
    for name in ("preferred_after", "kl", "reward_accuracy"):
        assert again[name] == report[name]
    looks = [[look["step"] for look in facts["history"]] for facts in _pretraining(folder, tmp_path / "run")]
    assert looks[0] == looks[1]


def _with(method, then):
    def both(self, *arguments, **named):
        method(self, *arguments, **named)
        then(self)

    return both


def _pretraining(*folders):
    return [json.loads((folder / "pretrain" / "report.json").read_text()) for folder in folders]


def test_other_settings_or_other_files_in_the_folder_are_named(course, tmp_path):
    folder, _ = course
    with pytest.raises(ingot.RunError, match="holds a demo with seed 0, not 1"):
        run(DemoConfig(**CUT_SHORT, output=str(folder), seed=1))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ingot.RunError, match=r"holds other files \(notes.txt\)"):
        run(DemoConfig(**CUT_SHORT, output=str(tmp_path)))
    (tmp_path / "notes.txt").rename(tmp_path / "stages.json")
    with pytest.raises(ingot.RunError, match=r"stages\.json: damaged"):
        run(DemoConfig(**CUT_SHORT, output=str(tmp_path)))


def test_merit_is_the_rule_of_the_world():
    for story in world.stories(3, "held_out", 50):
        prompt = conversation(story.request)
        assert merit(prompt, story.text) == (2.0 if world.pleases(story.prompt, story.text) else 1.0)
        assert merit(prompt, story.text[:-1]) == 0.0
        assert reward([prompt], [[{"role": "assistant", "content": story.text}]]) == [merit(prompt, story.text)]
    with pytest.raises(ingot.DataError, match="no request"):
        merit("Tell me something", "a story")


def test_no_two_uses_of_the_world_share_a_story():
    told = {story.text for story in world.stories(0, "train", 3000)}
    shown = {row["messages"][-1]["content"] for row in demonstrations(0, 500)}
    assert not told & shown
    asked = [row["prompt"][-1]["content"] for row in prompts(0, 500)]
    assert len(set(asked)) == 500


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_target_of_the_whole_path_is_met(tmp_path, seed):
    folder = tmp_path / "run"
    report = run(DemoConfig(output=str(folder), seed=seed, json=True))
    pretraining = json.loads((folder / "pretrain" / "report.json").read_text(encoding="utf-8"))
    assert (missed(pretraining), missed(report)) == ({}, {})


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DemoConfig().seed = 1
