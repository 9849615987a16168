"""The page of the demo's whole path: what it is given stands on it, what it is not given is left out, and what a model wrote does nothing."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest

import told_runs as told
from ingot import world
from ingot.demo.story import STAGES, draw_story
from test_report import HOSTILE, VERDICT, Page, assert_needs_nothing


def page_of(report: dict[str, Any]) -> Page:
    text = draw_story(report)
    page = Page(text)
    assert_needs_nothing(text, page)
    return page


def story(number: int) -> world.Story:
    return next(world.stories(0, "held_out", 1, start=number))


def answer(label: str, text: str, **facts: Any) -> dict[str, Any]:
    return {"label": label, "text": text, "facts": facts}


def full_report() -> dict[str, Any]:
    """As the demo writes it."""
    one, two = story(0), story(1)
    four = [
        answer(str(number + 1), story(number).text, rank=number + 1, true=2 - number % 3, turned=number == 3)
        for number in range(4)
    ]
    curve = {
        "title": "Picking the best of n",
        "x_title": "n",
        "y_title": "share that please",
        "read": "The more stories to pick from, the better the pick.",
        "series": [{"name": "judged by the rule", "points": [[1, 0.52], [2, 0.66], [4, 0.78], [8, 0.86], [16, 0.91]]}],
        "levels": [{"y": 0.52, "name": "without picking"}],
    }
    return {
        "reward_accuracy": 0.934,
        "preferred_before": 0.521,
        "preferred_after": 0.943,
        "follows_prompt_before": 0.962,
        "follows_prompt_after": 0.958,
        "well_formed_before": 0.991,
        "well_formed_after": 0.994,
        "diversity_before": 21.4,
        "diversity_after": 17.25,
        "kl": 3.14,
        "elapsed_s": 541.0,
        "total_s": 634.0,
        "dpo": {"preferred_after": 0.887, "follows_prompt_after": 0.949, "well_formed_after": 0.993, "diversity_after": 16.5, "kl": 4.5},
        "changes": {"preferred": {"mean": 0.422, "low": 0.405, "high": 0.439}, "follows_prompt": {"mean": -0.004, "low": -0.012, "high": 0.004}},
        "targets": {
            "preferred_after": {"wanted": ">= 0.90", "reached": 0.943, "met": True},
            "follows_prompt_change": {"wanted": ">= -0.03", "reached": -0.012, "met": True},
            "reward_accuracy": {"wanted": ">= 0.90", "reached": 0.934, "met": True},
            "diversity_after": {"wanted": ">= 0.50", "reached": 0.806, "met": True},
        },
        "num_held_out": 4000,
        "temperature": 1.0,
        "seed": 7,
        "noise": 0.2,
        "labeler": "rule",
        "num_parameters": 1_234_567,
        "recipe": "world",
        "machine": {"cpu": "a processor", "threads": 2, "level": "avx2", "version": "0.1.0"},
        "stages": [
            {
                "name": "pretrain",
                "elapsed_s": 210.0,
                "budget_s": 240.0,
                "figures": {"num_documents": 30000, "num_tokens": 3_000_000, "num_parameters": 1_234_567, "eval_loss": 1.27, "true_entropy": 1.19, "gap": 0.08},
                "history": [line for line in told.sft_lines() if "eval_eos_rate" not in line] + [{"step": 200, "eval_loss": 1.27}],
                "samples": [{"prompt": one.request.text, "answers": [answer("untrained", "the the of mm"), answer("pretrained", one.text)]}],
                "folder": "runs/demo/base",
            },
            {
                "name": "sft",
                "elapsed_s": 45.0,
                "budget_s": 60.0,
                "figures": {"num_demonstrations": 4000, "follows_prompt": 0.962, "eos_rate": 0.998},
                "history": told.sft_lines(),
                "verdict": {"passed": True, "sentences": ["Answers end by themselves."], "advice": "", "figures": {}},
                "samples": [{"prompt": one.request.text, "answers": [answer("before", "Kira was"), answer("after", one.text, follows=True, pleases=False)]}],
            },
            {"name": "responses", "elapsed_s": 22.0, "figures": {"num_prompts": 1500, "num_responses": 6000}},
            {"name": "rankings", "elapsed_s": 1.5, "figures": {"num_rankings": 1500, "flipped": 0.204}, "samples": [{"prompt": two.request.text, "answers": four}]},
            {"name": "reward", "elapsed_s": 60.0, "budget_s": 60.0, "figures": {"accuracy_noiseless": 0.934, "baseline_length": 0.5}, "history": told.reward_lines(), "verdict": {"passed": True, "sentences": ["Orders 93 % of pairs."], "figures": {}}},
            {"name": "best_of_n", "elapsed_s": 9.0, "figures": {"n": 16, "gain": 0.39, "gain_low": 0.33}, "charts": [curve], "verdict": {"passed": True, "sentences": ["Picking gains."], "figures": {}}},
            {"name": "ppo", "elapsed_s": 190.0, "budget_s": 180.0, "figures": {"updates": 200, "episodes": 12800}, "history": told.ppo_lines(), "verdict": VERDICT, "samples": [{"prompt": two.request.text, "answers": [answer("before", one.text), answer("after", two.text, pleases=True)]}] * 3},
            {"name": "dpo", "elapsed_s": 35.0, "history": told.dpo_lines()},
            {"name": "report"},
        ],
        "samples": [
            {"prompt": story(number).request.text, "answers": [answer(label, story(number).text, pleases=label != "fine-tuned") for label in ("pretrained", "fine-tuned", "PPO", "DPO")]}
            for number in range(6)
        ],
    }  # fmt: skip


def test_every_stage_is_told_with_what_went_in_what_changed_and_how_we_know():
    report = full_report()
    page = page_of(report)
    place = 0
    for number, stage in enumerate(report["stages"][:-1], 1):
        words = STAGES[stage["name"]]
        place = page.text.index(f"{number} {words.title}", place)
        for text in (words.in_a_word, words.went_in, words.changed, words.known):
            assert page.text.index(" ".join(text.split()), place) > place
    assert page.text.count("What went in") == page.text.count("How we know") == 8


def test_the_figures_are_those_of_the_report():
    page = page_of(full_report())
    for words in (
        "52.1 % → 94.3 % stories that please their reader",
        "93.4 % of held-out pairs the reward model orders rightly",
        "Stories that please their reader 52.1 % 94.3 % +42.2 (+40.5 to +43.9) 88.7 % ✓ ≥ 0.90",
        "Stories that do all that was asked 96.2 % 95.8 % -0.4 (-1.2 to +0.4) 94.9 % ✓ ≥ -0.03",
        "Diversity: entropy of its stories, nats 21.4 17.25 16.5 ✓ ≥ 0.50 of before",
        "Distance from the model before (KL), nats a story 3.14 4.5",
        "In 9 min 1 s of training",
        "1,234,567 weights",
        "20 in 100 were turned round on purpose",
        "4,000 requests that no stage learned from",
        "30,000 texts",
        "20.4 % turned round",
        "1.19 the floor under it",
        "Every target is met",
        "Ranked by the world's rule",
    ):
        assert words in page.text, words


def test_verdicts_alarms_notes_and_samples_stand_in_their_stage():
    report = full_report()
    report["stages"][6]["note"] = "A remark."
    page = page_of(report)
    begin, end = page.text.index("7 Reinforcement learning (PPO)"), page.text.index("8 The shorter way (DPO)")
    part = page.text[begin:end]
    for sentence in (
        *VERDICT["sentences"],
        VERDICT["advice"],
        "A remark.",
        "over-optimisation at step 130",
        "✓ pleases",
        "1 more",
    ):
        assert sentence in part, sentence
    for title in STAGES["ppo"].charts:
        assert title in part
    assert page.text.count("(turned round)") == 1
    assert "rank 1 true 2" in page.text


def test_a_missed_target_is_said_with_its_reason():
    report = full_report()
    report["targets"]["preferred_after"] = {
        "wanted": ">= 0.90",
        "reached": 0.81,
        "met": False,
        "why": "Too few updates fit; 400 would do.",
    }
    page = page_of(report)
    assert "preferred after : wanted ≥ 0.90, reached 0.81. Too few updates fit; 400 would do." in page.text
    assert "Every target is met" not in page.text
    assert "✗ ≥ 0.90" in page.text


def test_a_person_who_ranks_is_named():
    report = full_report() | {"labeler": "me", "noise": None}
    text = page_of(report).text
    assert "Ranked by me" in text
    assert "on purpose, of which" not in text


@pytest.mark.parametrize("left", range(10))
def test_a_report_that_ends_early_is_told_as_far_as_it_goes(left):
    report = full_report()
    report["stages"] = report["stages"][:left]
    if left < 8:
        for name in ("dpo", "targets", "preferred_after", "kl", "changes"):
            report.pop(name)
    page_of(report)


def test_nothing_at_all_is_a_page_too():
    assert "A small model learns" in page_of({}).text
    page_of({"stages": [{"name": name} for name in STAGES]})
    page_of({"stages": [{"name": "something new", "title": "A new stage", "figures": {"strange": 3}}, {}]})


def test_each_key_may_be_missing():
    whole = full_report()
    for stage in whole["stages"]:
        stage["history"] = stage.get("history", [])[::20]
    for name in whole:
        report = copy.copy(whole)
        del report[name]
        draw_story(report)
    for number, stage in enumerate(whole["stages"]):
        for name in set(stage) - {"name"}:
            report = copy.deepcopy(whole)
            del report["stages"][number][name]
            draw_story(report)


def test_numbers_that_are_none_are_left_out():
    report = full_report()
    report |= {"preferred_after": math.nan, "kl": None, "elapsed_s": math.inf}
    report["stages"][0]["figures"]["eval_loss"] = math.nan
    assert not re.search(r"\b(inf|nan)\b", page_of(report).text)


def test_hostile_text_does_nothing():
    evil = "".join(HOSTILE)
    sample = {"prompt": evil, "answers": [{"label": evil, "text": evil, "facts": {evil: evil}}]}
    chart = {
        "title": evil,
        "x_title": evil,
        "y_title": evil,
        "read": evil,
        "series": [{"name": evil, "points": [[0, 1], [1, 2]]}],
        "levels": [{"y": 1, "name": evil}],
    }
    verdict = {"passed": False, "sentences": [evil], "advice": evil, "figures": {evil: evil}}
    stage = {
        "name": evil,
        "title": evil,
        "figures": {evil: evil},
        "verdict": verdict,
        "samples": [sample],
        "charts": [chart],
        "folder": evil,
        "note": evil,
    }
    report = {
        "stages": [
            stage,
            {**stage, "name": "ppo", "history": [{"step": 1, evil: 1.0}, {"step": 1, "alarm": evil, "message": evil}]},
        ],
        "samples": [sample],
        "labeler": evil,
        "recipe": evil,
        "machine": {"cpu": evil, "version": evil},
        "targets": {evil: {"wanted": evil, "reached": evil, "met": False, "why": evil}},
    }
    page = page_of(report)
    assert "<script>alert(1)</script>" in page.text
    assert not any(mark in page.text for mark in "\u202e\x00\x07\x1b")
