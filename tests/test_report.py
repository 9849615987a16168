"""The report: what it tells is what the run's files hold, on a page that needs nothing from elsewhere, whatever is in the files."""

from __future__ import annotations

import html.parser
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

import ingot
import told_runs as told
from ingot import reporting
from ingot.cli import main
from ingot.configs import Architecture, PretrainConfig, SFTConfig
from ingot.reporting import charts
from ingot.reporting.charts import Level, Mark, Series
from ingot.reporting.page import draw_page, figure
from ingot.reporting.settings import config_class, settings_of
from killable_sft import rows, write_rows

_VOID = {"meta", "br", "link", "img", "input", "hr"}
_SVG = "{http://www.w3.org/2000/svg}"


class Page(html.parser.HTMLParser):
    """Tags closed in order, and what a page says and points at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in _VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.links.append(value)
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> inside <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)


def page_of(*folders: Path) -> Page:
    text = draw_page(reporting.facts(*folders))
    page = Page(text)
    assert_needs_nothing(text, page)
    return page


def assert_needs_nothing(text: str, page: Page) -> None:
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not page.handlers
    assert not set(page.tags) & {"link", "iframe", "img", "object", "embed", "form", "base"}
    assert page.tags.count("script") == 1
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"https?://", text.replace("http://www.w3.org/2000/svg", ""))


def svgs(text: str) -> list[ElementTree.Element]:
    """The outer pictures of a page."""
    return [ElementTree.fromstring(one) for one in re.findall(r"<svg [^>]*data-scale.*?</svg>\n(?=</div>)", text, re.S)]


PROMPTS = ("Tell of Mara and the mill.", "Where is the kite?", "p3", "p4", "p5", "p6")
VERDICT = {
    "passed": False,
    "sentences": ["The proxy rose from 0.05 to 2.51.", "Gold fell to 0.81."],
    "figures": {"objective/scores": 2.51, "note": "text", "nothing": None},
    "advice": "Raise --kl-coef.",
}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A pretrained model, a fine-tuned one, a reward model, and PPO on them."""
    root = tmp_path / "runs"
    told.write_run(
        root / "base", "pretrain", metrics=told.sft_lines(), config={"output": "runs/base", "data": ["text.txt"]}
    )
    told.write_run(
        root / "sft",
        "sft",
        metrics=told.sft_lines(),
        samples=told.samples_of((0, 100, 200), PROMPTS),
        config={"output": "runs/sft", "model": "runs/base", "data": ["demos.jsonl"], "learning_rate": 1e-3},
        verdict={"passed": True, "sentences": ["It ends its answers."], "figures": {}},
        data={"num_rows": 4321},
    )
    told.write_run(
        root / "rm",
        "reward",
        metrics=told.reward_lines(),
        config={"output": "runs/rm", "model": "runs/sft", "data": ["ranked.jsonl"]},
        verdict={
            "passed": True,
            "sentences": ["Orders 71 %."],
            "figures": {"accuracy_longer_wins": 0.58, "people_agreement": 0.76},
        },
    )
    told.write_run(
        root / "ppo",
        "ppo",
        metrics=told.ppo_lines(),
        samples=told.samples_of((0, 50, 100, 200), PROMPTS, gold=0.5),
        config={
            "output": "runs/ppo",
            "model": "runs/sft",
            "reward_model": "runs/rm:helpful",
            "judge": "runs/other",
            "kl_target": 12.0,
        },
        verdict=VERDICT,
        machine={"cpu": "a processor", "threads": 2},
    )
    told.write_run(root / "dpo", "dpo", metrics=told.dpo_lines(), config={"output": "runs/dpo", "model": "runs/sft"})
    told.write_run(root / "grpo", "grpo", metrics=told.grpo_lines(), finished=False, config={"output": "runs/grpo"})
    return root


# What is told


@pytest.mark.parametrize("kind", ["base", "sft", "rm", "dpo", "ppo", "grpo"])
def test_every_kind_of_run_is_told_on_a_page_that_needs_nothing(family, kind):
    page = page_of(family / kind)
    assert page.tags.count("figure") >= 4
    assert page.tags.count("svg") >= page.tags.count("figure")
    # Behind each picture its numbers.
    assert page.tags.count("table") >= page.tags.count("figure")


def test_verdict_and_alarms_are_there_word_for_word(family):
    page = page_of(family / "ppo")
    for sentence in [*VERDICT["sentences"], VERDICT["advice"]]:
        assert sentence in page.text
    assert "Not passed" in page.text
    alarms = [line for line in told.ppo_lines() if "alarm" in line]
    assert len(alarms) == 2
    for number, line in enumerate(alarms, 1):
        assert re.search(rf"\b{number} {line['alarm']} at step {line['step']} ", page.text)
        assert line["message"] in page.text
    assert page.text.index("Not passed") < page.text.index("alarms were raised") < page.text.index("How it went")


def test_alarms_are_marked_in_the_charts_that_they_speak_of(family):
    figures = {one["title"]: one for one in reporting.facts(family / "ppo")["figures"] if one["kind"] == "lines"}
    marked = {title: [mark["sign"] for mark in one["marks"]] for title, one in figures.items() if one["marks"]}
    assert marked == {"Scores side by side": ["1"], "Entropy of an answer": ["2"]}
    assert figures["Scores side by side"]["marks"][0]["x"] == 130


def test_an_alarm_of_no_chart_is_marked_in_the_first(tmp_path):
    lines = [*told.sft_lines(), {"step": 200, "alarm": "odd", "message": "nobody knows"}]
    figures = reporting.facts(told.write_run(tmp_path / "run", "sft", metrics=lines))["figures"]
    assert [mark["sign"] for mark in figures[0]["marks"]] == ["1"]
    assert not any(one.get("marks") for one in figures[1:])


def test_a_plain_word_is_no_metric_until_it_does_something(tmp_path):
    lines = [
        {"step": 1, "reward": 1.0, "objective/kl": 0.1, "entropy": 1.0},
        {"step": 2, "reward": 2.0, "objective/kl": 9.0, "entropy": 0.1},
    ]
    lines += [{"step": 2, "alarm": "KL", "message": "it is 9 nats: what the reward says there means little"}]
    lines += [{"step": 2, "alarm": "collapse", "message": "entropy fell from 1 to 0.1: low"}]
    report = reporting.facts(told.write_run(tmp_path / "run", "grpo", metrics=lines))
    marked = {one["title"]: [mark["sign"] for mark in one["marks"]] for one in report["figures"] if one["marks"]}
    assert marked == {"Distance from the start (KL)": ["1"], "Entropy": ["2"]}
    assert [alarm["metrics"] for alarm in report["alarms"]] == [[], ["entropy"]]


def test_charts_hold_the_numbers_of_metrics(family):
    lines = [line for line in told.ppo_lines() if "alarm" not in line]
    told_of = reporting.facts(family / "ppo")
    series = {
        one["metric"]: one["points"]
        for chart in told_of["figures"]
        if chart.get("over_steps")
        for one in chart["series"]
    }
    for name in lines[0]:
        if name not in ("step", "episode", "time/elapsed_s"):
            assert series[name] == [(line["step"], line[name]) for line in lines], name
    distance = next(one for one in told_of["figures"] if one["title"] == "Score against distance")
    assert distance["series"][2]["points"] == [(line["objective/kl"], line["objective/gold"]) for line in lines]


def test_tables_hold_the_numbers_of_metrics(family):
    text = draw_page(reporting.facts(family / "ppo"))
    lines = {line["step"]: line for line in told.ppo_lines() if "alarm" not in line}
    table = text[text.index("<h3>Scores side by side") :]
    rows = re.findall(r'<tr data-x="([\d.]+)">(.*?)</tr>', table[: table.index("</table>")], re.S)
    assert len(rows) >= 20
    assert float(rows[0][0]) == 1
    assert float(rows[-1][0]) == 200
    for x, cells in rows:
        values = [float(cell) for cell in re.findall(r'"number">([^<]*)<', cells)][1:]
        line = lines[int(float(x))]
        assert values == pytest.approx([line[f"objective/{name}"] for name in ("scores", "judge", "gold")], rel=1e-5)


def test_headlines_are_the_first_and_the_last_value(family):
    headlines = {one["metric"]: one for one in reporting.facts(family / "sft")["headlines"]}
    evals = [line for line in told.sft_lines() if "eval_loss" in line]
    assert headlines["eval_loss"]["first"] == evals[0]["eval_loss"]
    assert headlines["eval_loss"]["last"] == evals[-1]["eval_loss"]
    assert headlines["eval_loss"]["last_step"] == 200
    text = page_of(family / "sft").text
    assert f"{evals[0]['eval_loss']:.3g} → {evals[-1]['eval_loss']:.3g} loss, nats per token, held out" in text


def test_a_metric_that_nobody_expected_is_shown_plainly(tmp_path):
    lines = [{"step": step, "loss": 1.0, "my/own": 0.25 * step} for step in range(5)]
    page = page_of(told.write_run(tmp_path / "run", "ppo", metrics=lines))
    assert "my/own" in page.text


def test_a_reward_model_stands_beside_its_baselines_and_bins(family):
    figures = {one["title"]: one for one in reporting.facts(family / "rm")["figures"]}
    levels = {level["name"]: level["y"] for level in figures["Judged as people did"]["levels"]}
    assert levels == {"a coin": 0.5, "prefers the longer": 0.58, "people with each other": 0.76}
    assert {"helpful, held out", "harmless, held out"} <= {
        one["name"] for one in figures["Judged as people did, by criterion"]["series"]
    }
    last = [line for line in told.reward_lines() if "eval_loss" in line][-1]
    bars = figures["Right by difference of lengths"]["bars"]
    assert [bar["name"] for bar in bars] == ["much shorter", "shorter", "similar", "longer", "much longer"]
    assert [bar["value"] for bar in bars] == [last[bar["metric"]] for bar in bars]


# Samples


def test_samples_are_the_same_prompts_at_the_first_and_the_last_look(family):
    samples = reporting.facts(family / "ppo")["samples"]
    assert (samples["first_step"], samples["last_step"]) == (0, 200)
    assert [entry["prompt"] for entry in samples["prompts"]] == list(PROMPTS)
    for entry in samples["prompts"]:
        assert [look["step"] for look in entry["looks"]] == [0, 50, 100, 200]
        assert entry["looks"][0]["completions"][0]["text"].startswith("At step 0 ")
        assert entry["looks"][-1]["completions"][0] == {
            "text": next(
                line["completion"] for line in told.samples_of((200,), PROMPTS) if line["prompt"] == entry["prompt"]
            ),
            "facts": {"ended": True, "gold": 0.5},
        }
    page = page_of(family / "ppo")
    assert page.text.index("before: step 0") < page.text.index("after: step 200")
    assert "2 more prompts" in page.text
    assert "✗ ended" in page.text
    assert "✓ ended gold 0.5" in page.text


def test_several_answers_to_a_prompt_stay_together(tmp_path):
    lines = [{"step": 1, "prompt": "p", "completion": f"answer {number}"} for number in range(3)]
    looks = reporting.facts(told.write_run(tmp_path / "run", "grpo", samples=lines))["samples"]["prompts"][0]["looks"]
    assert [one["text"] for one in looks[0]["completions"]] == ["answer 0", "answer 1", "answer 2"]


def test_a_reward_model_shows_scores_beside_the_ranks_of_people(tmp_path):
    lines = [
        {
            "step": step,
            "prompt": "p",
            "responses": ["good", "bad", "odd"],
            "scores": [{"helpful": 0.5 * step}, {"helpful": -0.5 * step}, {"helpful": 0.0}],
            "judgements": [{"criterion": "helpful", "responses": [1, 0], "ranks": [2, 1]}],
        }
        for step in (0, 2)
    ]
    entry = reporting.facts(told.write_run(tmp_path / "run", "reward", samples=lines))["samples"]["prompts"][0]
    assert entry["looks"][-1]["completions"] == [
        {"text": "good", "facts": {"helpful": 1.0, "rank": 1}},
        {"text": "bad", "facts": {"helpful": -1.0, "rank": 2}},
        {"text": "odd", "facts": {"helpful": 0.0}},
    ]
    assert "or labels that people gave" in page_of(tmp_path / "run").text


def test_what_was_answered_before_stands_beside_a_late_sample(tmp_path):
    lines = [{"step": 50, "prompt": "p", "completion": "late", "before": "early", "score": 1.0}]
    looks = reporting.facts(told.write_run(tmp_path / "run", "ppo", samples=lines))["samples"]["prompts"][0]["looks"]
    assert [(look["step"], look["completions"][0]["text"]) for look in looks] == [(0, "early"), (50, "late")]
    assert looks[1]["completions"][0]["facts"] == {"score": 1.0}


def test_held_out_scores_stand_beside_those_of_training(tmp_path):
    lines = [{"step": step, "objective/scores": 1.0 * step, "objective/kl": 0.1 * step} for step in range(1, 9)]
    lines += [
        {"step": step, "eval_score": 2.0 * step, "eval_gold": 3.0 * step, "eval_kl": 0.2 * step} for step in (0, 4, 8)
    ]
    report = reporting.facts(told.write_run(tmp_path / "run", "ppo", metrics=lines))
    charts_by = {
        chart["title"]: {one["metric"]: one["points"] for one in chart["series"]} for chart in report["figures"]
    }
    assert set(charts_by["Scores side by side"]) == {"objective/scores", "eval_score", "eval_gold"}
    assert charts_by["Score against distance"]["eval_gold"] == [(0.0, 0.0), (0.8, 12.0), (1.6, 24.0)]
    assert [(one["label"], one["last"]) for one in report["headlines"]][:2] == [
        ("score by the proxy, held out", 16.0),
        ("score by gold, held out", 24.0),
    ]


HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "\u202edesrever\u202c",
    "\ud800 lone",
    "nul \x00 bell \x07 esc \x1b[31m",
    "]]> --> <!-- \"'>",
]


def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    evil = "".join(HOSTILE)
    lines = [{"step": step, "loss": 1.0, f"<b>{step}</b>onload": 1.0, "objective/scores": 1.0} for step in (1, 2)]
    lines.append({"step": 2, "alarm": "<i>bad</i>", "message": evil})
    samples = [{"step": step, "prompt": evil, "completion": evil, evil: evil, "score": 1} for step in (1, 2)]
    samples.append({"step": 2, "prompt": [{"role": evil, "content": evil}], "completion": None})
    folder = told.write_run(
        tmp_path / "run",
        "sft",
        metrics=lines,
        samples=samples,
        config={"model": evil, "data": [evil], evil: evil},
        verdict={"passed": False, "sentences": [evil], "figures": {evil: evil}, "advice": evil},
        data={evil: evil},
        versions={evil: evil},
        machine={"cpu": evil},
    )
    for page in (page_of(folder), page_of(folder, folder)):
        assert "<script>alert(1)</script>" in page.text, "as words"
        assert "\\u202e" in page.text
        assert "{{ 7 * 7 }}" in page.text
        assert not any(mark in page.text for mark in "\u202e\x00\x07\x1b")
    target = reporting.report(folder)
    assert b"\x00" not in target.read_bytes()
    target.read_bytes().decode("utf-8")


@hypothesis.given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
@hypothesis.settings(max_examples=30)
def test_any_text_leaves_the_page_whole(tmp_path_factory, texts):
    folder = told.write_run(
        tmp_path_factory.mktemp("run"),
        "ppo",
        metrics=[{"step": 1, "loss": 1.0, texts[0]: 2.0}],
        samples=[{"step": 1, "prompt": text, "completion": text, "note": text} for text in texts],
        verdict={"passed": True, "sentences": texts, "figures": {}},
    )
    page_of(folder)


# Where it comes from


def test_the_chain_of_runs_with_data_and_verdicts(family):
    chain = reporting.facts(family / "ppo")["lineage"]
    names = [(entry["kind"], Path(entry["name"]).name) for entry in chain]
    assert names == [("pretrain", "base"), ("sft", "sft"), ("reward", "rm:helpful"), (None, "other"), ("ppo", "ppo")]
    assert chain[1]["verdict"] == {"passed": True, "text": "It ends its answers."}
    assert chain[1]["data"] == ["demos.jsonl", "4,321 rows"]
    assert chain[0]["verdict"] is None
    assert not chain[3]["found"]
    assert [source["role"] for source in chain[-1]["sources"]] == [
        "started from",
        "scored by (proxy)",
        "watched by (judge)",
    ]
    text = page_of(family / "ppo").text
    assert "Orders 71 %." in text
    assert "4,321 rows" in text


def test_a_judge_that_was_also_the_reward_is_a_proxy(family):
    facts = json.loads((family / "ppo" / "run.json").read_text())
    facts["config"]["judge"] = str(family / "rm")
    (family / "ppo" / "run.json").write_text(json.dumps(facts))
    report = reporting.facts(family / "ppo")
    assert [source["role"] for source in report["lineage"][-1]["sources"]].count("scored by (proxy)") == 2
    names = [
        one["name"]
        for chart in report["figures"]
        for one in chart.get("series", ())
        if one["metric"] == "objective/judge"
    ]
    assert names
    assert all("proxy" in name and "judge" not in name for name in names)
    labels = [one["label"] for one in report["headlines"] if one["metric"] == "objective/judge"]
    assert labels == ["score by the proxy (again)"]


def test_a_chain_that_bites_its_tail_ends(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        told.write_run(tmp_path / name, "sft", metrics=told.sft_lines()[:3], config={"model": str(tmp_path / other)})
    chain = reporting.facts(tmp_path / "a")["lineage"]
    assert [Path(entry["folder"]).name for entry in chain] == ["b", "a"]


# Settings


def test_settings_that_differ_from_the_defaults_with_what_they_mean(family):
    rows = {row["name"]: row for row in reporting.facts(family / "sft")["settings"]}
    changed = {name for name, row in rows.items() if row["changed"]}
    assert changed == {"model", "data", "learning_rate"}
    assert rows["learning_rate"]["default"] == 2e-5
    assert rows["learning_rate"]["meaning"].startswith("Peak learning rate")
    assert rows["adam_beta1"]["meaning"] == "Decay of AdamW's first moment."
    assert set(rows) >= set(ingot.SFTConfig().to_dict())


def test_the_settings_of_a_run_with_nothing_set_are_the_defaults():
    config = PretrainConfig()
    changed = [row["name"] for row in settings_of("pretrain", config.to_dict()) if row["changed"]]
    assert changed == []
    assert config_class("pretrain") is PretrainConfig
    assert config_class("../evil") is None
    assert config_class("checks") is None


# Runs that are not whole


def test_an_unfinished_run_says_so_and_how_to_go_on(family):
    page = page_of(family / "grpo")
    assert "Not finished: no verdict yet" in page.text
    assert "100 of 200 steps" in page.text
    assert f"ingot grpo --resume {family / 'grpo'}" in page.text


def test_a_run_that_measured_nothing_yet(tmp_path):
    page = page_of(told.write_run(tmp_path / "run", "sft", finished=False))
    assert "nothing was measured yet" in page.text
    assert "figure" not in page.tags


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "samples.jsonl", "verdict.json"])
@pytest.mark.parametrize("harm", ["missing", "garbage", "cut", "wrong"])
def test_damage_is_told_and_the_rest_is_shown(family, name, harm):
    file = family / "ppo" / name
    content = file.read_bytes()
    match harm:
        case "missing":
            file.unlink()
        case "garbage":
            file.write_bytes(b"\xff\xfe\x00 garbage")
        case "cut":
            file.write_bytes(content[: len(content) // 2])
        case "wrong":
            file.write_bytes(b'[1, {"config": 3, "step": "x", "loss": "y"}, null]\n' * 3)
    page = page_of(family / "ppo")
    if harm != "missing" or name == "run.json":
        assert str(file) in page.text, "the damage is named"
    if name != "metrics.jsonl":
        assert "Scores side by side" in page.text or name == "run.json"
        assert "collapse" in page.text
    if name != "verdict.json":
        assert VERDICT["sentences"][0] in page.text
    page_of(family / "ppo", family / "sft")


def test_a_run_of_an_older_format(tmp_path):
    """Facts with less in them, a step without its loss, numbers that are none."""
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "run.json").write_text(
        json.dumps({"format_version": 0, "kind": "sft", "config": {"lr": 1e-3, "model": ["?"]}})
    )
    lines = [{"step": 1, "loss": None}, {"loss": 2.0}, {"step": 2, "loss": "NaN"}, {"step": 3, "loss": 1.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = reporting.facts(folder)
    assert report["figures"][0]["series"][0]["points"] == [(3, 1.5)]
    assert any(row["name"] == "lr" for row in report["settings"])
    page_of(folder)


def test_a_newer_format_is_shown_with_a_word_about_it(tmp_path):
    folder = told.write_run(tmp_path / "run", "sft", metrics=told.sft_lines(), format_version=99)
    assert "newer version of ingot" in page_of(folder).text


@pytest.mark.parametrize("make", [False, True])
def test_no_run_is_one_line(tmp_path, capsys, make):
    folder = tmp_path / "nothing"
    if make:
        folder.mkdir()
    assert main(["report", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(folder) in error
    assert "give the --output folder of a run" in error


# Several runs


def test_runs_are_compared(family):
    other = told.write_run(
        family / "ppo2", "ppo", metrics=told.ppo_lines()[:80], config={"kl_target": 6.0, "model": "runs/sft"}
    )
    report = reporting.facts(family / "ppo", other)
    scores = next(one for one in report["figures"] if one["title"] == "Scores side by side: gold")
    lines = [line for line in told.ppo_lines() if "alarm" not in line]
    assert [one["name"] for one in scores["series"]] == ["ppo", "ppo2"]
    assert scores["series"][0]["points"] == [(line["step"], line["objective/gold"]) for line in lines]
    assert scores["series"][1]["points"] == [(line["step"], line["objective/gold"]) for line in lines[:80]]
    rows = {row["name"]: row["values"] for row in report["differences"]}
    assert rows["kl_target"] == [12.0, 6.0]
    assert "model" not in rows
    page = page_of(family / "ppo", other)
    assert VERDICT["sentences"][1] in page.text


def test_losses_of_different_phases_are_not_laid_over_each_other(family):
    report = reporting.facts(family / "base", family / "sft", family / "dpo")
    losses = [
        [one["name"] for one in chart["series"]]
        for chart in report["figures"]
        if chart["series"][0]["metric"] == "loss"
    ]
    assert losses == [["base", "sft"]]


def test_what_they_wrote_to_the_same_prompts(family):
    report = reporting.facts(family / "sft", family / "ppo")
    assert [entry["prompt"] for entry in report["samples"]] == list(PROMPTS)
    assert [(look["name"], look["step"]) for look in report["samples"][0]["looks"]] == [("sft", 200), ("ppo", 200)]
    page_of(family / "sft", family / "ppo")
    page_of(family / "sft", family / "dpo")


# Charts


def test_points_lie_where_their_values_say():
    points = [(0.0, 1.0), (10.0, 3.0), (40.0, 2.0)]
    picture = charts.draw_chart([Series("a", points)], "t", "x", "y")
    root = ElementTree.fromstring(picture)
    low, high, left, right, top, bottom = map(float, root.get("data-scale").split())
    assert (low, high) == (0.0, 40.0)
    line = next(root.iter(f"{_SVG}polyline"))
    places = [tuple(map(float, place.split(","))) for place in line.get("points").split()]
    labels = {
        text.text: float(text.get("y")) - 0.35 * charts.WIDE.font
        for text in root.iter(f"{_SVG}text")
        if text.get("text-anchor") == "end"
    }
    for (x, y), (across, down) in zip(points, places, strict=True):
        assert across == pytest.approx(left + (right - left) * x / 40, abs=0.06)
        assert down == pytest.approx(labels[f"{y:.1f}" if f"{y:.1f}" in labels else f"{y:.2f}"], abs=0.11)
    assert top - 0.1 <= min(down for _, down in places)
    assert max(down for _, down in places) <= bottom + 0.1


def test_marks_and_levels_lie_where_their_values_say():
    picture = charts.draw_chart(
        [Series("a", [(0.0, 0.0), (100.0, 1.0)])],
        "t",
        "x",
        "y",
        marks=[Mark(25, "7"), Mark(900, "8")],
        levels=[Level(0.5, "half")],
    )
    root = ElementTree.fromstring(picture)
    _, _, left, right, top, bottom = map(float, root.get("data-scale").split())
    lines = {line.get("class"): line for line in root.iter(f"{_SVG}line")}
    assert float(lines["mark"].get("x1")) == pytest.approx(left + (right - left) / 4, abs=0.06)
    assert float(lines["level"].get("y1")) == pytest.approx((top + bottom) / 2, abs=0.06)
    words = [text.text for text in root.iter(f"{_SVG}text")]
    assert "7" in words
    assert "8" not in words, "outside of the picture"
    assert "half" in words


def test_many_points_are_thinned_without_losing_a_peak():
    points = [(float(x), math.sin(x / 50)) for x in range(5000)]
    points[1234] = (1234.0, 9.0)
    points[3210] = (3210.0, -9.0)
    kept = charts.thinned(points)
    assert len(kept) <= 300
    assert {points[0], points[-1], points[1234], points[3210]} <= set(kept)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert charts.thinned(points[:300]) == points[:300]


@hypothesis.given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_the_trend_is_a_mean_of_neighbours(values):
    points = [(float(x), y) for x, y in enumerate(values)]
    smooth = charts.trend(points)
    half = max(1, len(values) // 40)
    for index, (x, y) in enumerate(smooth):
        reach = min(half, index, len(values) - 1 - index)
        near = values[index - reach : index + reach + 1]
        assert x == index
        assert y == pytest.approx(math.fsum(near) / len(near), abs=1e-6 * (1 + max(map(abs, values))))


@hypothesis.given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9), st.integers(2, 12))
def test_ticks_are_round_few_and_enclose(a, b, most):
    low, high = min(a, b), max(a, b)
    hypothesis.assume(high == low or high - low > 1e-5 * max(abs(low), abs(high)))
    found = charts.ticks(low, high, most)
    assert found[0] <= low + 1e-6 * (found[1] - found[0])
    assert found[-1] >= high - 1e-6 * (found[1] - found[0])
    assert 2 <= len(found) <= most + 2
    names = [charts.label(tick, found) for tick in found]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "points", [[], [(0.0, 0.0)], [(5.0, -2.5)] * 2, [(0.0, 1e-9), (1.0, 2e-9)], [(0.0, 1e12), (1.0, 3e12)]]
)
def test_few_and_odd_points_are_drawn(points):
    ElementTree.fromstring(charts.draw_chart([Series("a", points)], "t<&>", "x", "y", frame=charts.SMALL))


def test_only_an_untrained_beginning_is_cut_off():
    falling = [(float(step), 1.0 + 7.0 * math.exp(-step)) for step in range(100)]
    top = charts.settled_top([Series("loss", falling)])
    assert top is not None
    assert top < 2.0
    assert charts.settled_top([Series("loss", [(float(step), 8.0 - 0.05 * step) for step in range(100)])]) is None
    spike = [(float(step), 9.0 if step == 80 else 1.0) for step in range(100)]
    assert charts.settled_top([Series("loss", spike)]) is None, "a late peak is what one looks for"


def test_numbers_for_a_person():
    assert [figure(value) for value in (None, True, 3, 12345, 2.0, 0.1234567, [1, "a"], {"a": 1})] == [
        "", "yes", "3", "12,345", "2", "0.123457", "1, a", '{"a": 1}',
    ]  # fmt: skip


# The command


def test_the_command_writes_the_page_into_the_folder(family, capsys):
    assert main(["report", str(family / "sft")]) == 0
    target = family / "sft" / "report.html"
    assert capsys.readouterr().out.strip() == str(target)
    assert target.read_text(encoding="utf-8") == draw_page(reporting.facts(family / "sft"))
    assert (
        main(["report", str(family / "sft"), str(family / "ppo"), "--output", str(family / "deep" / "both.html")]) == 0
    )
    assert "2 runs compared" in (family / "deep" / "both.html").read_text(encoding="utf-8")


def test_json_prints_the_facts_alone(family, capsys):
    assert main(["report", str(family / "ppo"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(reporting.facts(family / "ppo")))
    assert not (family / "ppo" / "report.html").exists()


def test_open_shows_the_page(family, monkeypatch):
    shown = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    assert main(["report", str(family / "sft"), "--open"]) == 0
    assert shown == [(family / "sft" / "report.html").resolve().as_uri()]


def test_where_the_page_cannot_be_written(family, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["report", str(family / "sft"), "--output", str(tmp_path / "file" / "page.html")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "choose another --output" in error


# Runs as they are


def test_runs_as_the_phases_leave_them(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number % 10} and {(number + 1) % 10}, " for number in range(600)))
    demos = write_rows(tmp_path / "demos.jsonl", rows())
    tiny = Architecture(num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
    base = PretrainConfig(
        data=(str(text),), output=str(tmp_path / "runs" / "base"), architecture=tiny, max_length=64, max_steps=20, sample_tokens=8, threads=1
    )  # fmt: skip
    first = ingot.pretrain(base, quiet=True)
    tuned = SFTConfig(
        model=base.output, data=(demos,), output=str(tmp_path / "runs" / "sft"), max_steps=12, sample_tokens=6, sample_prompts=3, threads=1
    )  # fmt: skip
    second = ingot.sft(tuned, quiet=True)
    for config, result in ((base, first), (tuned, second)):
        page = ingot.report(config.output)
        assert page == Path(config.output) / "report.html"
        report = reporting.facts(config.output)
        losses = [(line["step"], line["eval_loss"]) for line in result.history if "eval_loss" in line]
        loss = next(chart for chart in report["figures"] if chart["title"] == "Loss")
        assert next(one["points"] for one in loss["series"] if one["metric"] == "eval_loss") == losses
        assert report["headlines"][0]["last"] == result.final_loss
        steps = config.max_steps
        assert report["status"] == {
            "finished": True, "step": steps, "planned": steps, "text": f"Finished: {steps} steps.", "resume": "",
        }  # fmt: skip
        assert {"Network", "Learned from", "Took", "Machine", "Versions"} <= {row["label"] for row in report["summary"]}
        assert "1 thread" in next(row["value"] for row in report["summary"] if row["label"] == "Machine")
        defaults = type(config)().to_dict()
        given = {name for name, value in config.to_dict().items() if value != defaults.get(name)}
        changed = {row["name"].partition(".")[0] for row in report["settings"] if row["changed"]}
        assert changed == given
        looks = report["samples"]["prompts"][0]["looks"]
        assert (looks[0]["step"], looks[-1]["step"]) == (0, steps)
        page_of(Path(config.output))
    chain = reporting.facts(tuned.output)["lineage"]
    assert [entry["kind"] for entry in chain] == ["pretrain", "sft"]
    assert chain[1]["data"][0] == demos
    page_of(Path(base.output), Path(tuned.output))


@pytest.mark.parametrize("height", [1.0, -2.0])
def test_a_flat_line_stands_beside_zero(height):
    picture = charts.draw_chart([Series("a", [(0.0, height), (9.0, height)])], "t", "x", "y")
    written = [text.text for text in ElementTree.fromstring(picture).iter() if text.tag.endswith("text") and text.text]
    assert {"0.0", f"{height:.1f}"} <= set(written)
    assert "1.2" not in written
