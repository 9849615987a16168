"""Labellers of known quality behave as asked, and the statistics find out those with a bias and leave the others in peace."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

from ingot.data.keys import uniform
from ingot.errors import ConfigError
from ingot.feedback.agreement import measure_agreement
from ingot.feedback.candidates import Group
from ingot.feedback.criteria import load_criterion
from ingot.feedback.journal import Journal, read_judgements
from ingot.feedback.pairs import to_preferences
from ingot.feedback.session import Session, Showing, collect
from ingot.feedback.simulate import SimulatedLabeler, simulate_judgements


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """Nothing here cuts the power: a write need not wait for the disk, which may be busy."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def groups(count, size=2, seed=0):
    """Responses whose quality is drawn, with lengths that have nothing to do with it."""
    return [
        Group(
            group_id=f"{seed}-{n}",
            prompt=f"prompt {n}",
            responses=tuple(f"{seed} {n} {k} " + "x" * int(40 * uniform("length", seed, n, k)) for k in range(size)),
        )
        for n in range(count)
    ]


def quality(prompt, response):
    """Standard logistic, a function of the text."""
    share = uniform("quality", prompt, response)
    return math.log(share / (1 - share))


def by_rank(record):
    return [response for _, response in sorted(zip(record.ranks, record.responses, strict=True))]


def test_without_noise_the_score_ranks():
    def length(prompt, response):
        return float(len(response))

    labeler = SimulatedLabeler(score=length, noise=0)
    assert labeler(Showing("g", 0, "p", ("aa", "a", "aaa", "bb"))).ranks == (2, 3, 1, 2)
    ties = SimulatedLabeler(score=length, noise=0, tie_width=1)
    assert ties(Showing("g", 0, "p", ("a", "aa", "aaa", "aaaa"))).ranks == (2, 2, 1, 1)
    turned = SimulatedLabeler(score=length, noise=0, flip_rate=1)
    assert turned(Showing("g", 0, "p", ("aa", "a", "aaa", "bb"))).ranks == (2, 1, 3, 2)


def test_pairs_are_won_as_bradley_and_terry_say():
    for difference in (0.0, 0.5, 2.0):
        labeler = SimulatedLabeler(score=lambda prompt, response, d=difference: d * (response == "good"), seed=3)
        wins = sum(labeler(Showing(str(n), 0, "p", ("bad", "good"))).ranks == (2, 1) for n in range(4000))
        expected = 1 / (1 + math.exp(-difference))
        assert abs(wins / 4000 - expected) < 3.5 * math.sqrt(expected * (1 - expected) / 4000)


def test_rankings_are_drawn_from_plackett_and_luce():
    scores = {"a": 0.0, "b": 0.7, "c": 1.4}
    labeler = SimulatedLabeler(score=lambda prompt, response: scores[response])
    counts = dict.fromkeys(itertools.permutations("abc"), 0)
    for n in range(6000):
        ranks = labeler(Showing(str(n), 0, "p", ("a", "b", "c"))).ranks
        counts[tuple(sorted("abc", key=lambda letter: ranks["abc".index(letter)]))] += 1
    chi_square = 0.0
    for order, count in counts.items():
        strength = [math.exp(scores[letter]) for letter in order]
        probability = strength[0] / sum(strength) * strength[1] / (strength[1] + strength[2])
        chi_square += (count - 6000 * probability) ** 2 / (6000 * probability)
    # 5 degrees of freedom: 20.5 is the 0.999 quantile.
    assert chi_square < 20.5


def test_a_share_of_rankings_comes_out_turned_round():
    labeler = SimulatedLabeler(score=quality, noise=0, flip_rate=0.2)
    records = simulate_judgements(groups(2000, size=4), labeler)
    wrong = [by_rank(r) != sorted(r.responses, key=lambda text, r=r: -quality(r.prompt, text)) for r in records]
    assert 0.17 < np.mean(wrong) < 0.23
    pairs = list(to_preferences(records))
    share = np.mean([quality(row["prompt"], row["chosen"]) < quality(row["prompt"], row["rejected"]) for row in pairs])
    assert share == pytest.approx(np.mean(wrong))


def test_a_seed_gives_the_same_judgements_whatever_else_is_judged():
    many, few = groups(50, size=3), groups(50, size=3)[20:30]
    labeler = SimulatedLabeler(score=quality, name="a", seed=1)
    assert simulate_judgements(many, labeler)[20:30] == simulate_judgements(few, labeler)
    for other in (SimulatedLabeler(score=quality, name="b", seed=1), SimulatedLabeler(score=quality, name="a", seed=2)):
        assert [r.ranks for r in simulate_judgements(many, other)] != [
            r.ranks for r in simulate_judgements(many, labeler)
        ]


def test_what_is_shown_where_does_not_change_the_noise():
    labeler = SimulatedLabeler(score=quality)
    for order in itertools.permutations("abc"):
        ranks = labeler(Showing("g", 0, "p", order)).ranks
        assert dict(zip(order, ranks, strict=True)) == dict(
            zip("abc", labeler(Showing("g", 0, "p", tuple("abc"))).ranks, strict=True)
        )


def test_a_session_with_a_simulated_labeller_writes_what_a_person_would(tmp_path):
    path = tmp_path / "ranked.jsonl"
    labeler = SimulatedLabeler(score=quality, name="robot")

    def run(limit):
        session = Session(groups(30, size=3), Journal(path), labeler="robot", repeats=0, clock=lambda: "")
        return collect(session, labeler, limit=limit)

    assert len(run(10)) == 10
    assert len(run(None)) == 20
    assert read_judgements(path) == simulate_judgements(groups(30, size=3), labeler)


def biases(labeler, count=300, size=2, seed=0):
    """Of position and of length."""
    (report,) = measure_agreement(simulate_judgements(groups(count, size, seed), labeler), num_draws=1).labelers
    return report.position, report.length


@pytest.mark.parametrize("size", [2, 4])
def test_a_position_bias_is_found_out_at_300_judgements(size):
    found, shares = [], []
    for seed in range(10):
        for sign in (1, -1):
            labeler = SimulatedLabeler(score=quality, position_bias=sign * 1.2, seed=seed)
            position, _ = biases(labeler, size=size, seed=seed)
            found.append(position.alarm and (position.test.share > 0.5) == (sign > 0))
            shares.append(position.test.share if sign > 0 else 1 - position.test.share)
    # What such a labeller does: the earlier response wins about 64 % of pairs.
    assert 0.58 < np.mean(shares) < 0.72
    assert np.mean(found) >= 0.95


def test_a_length_bias_is_found_out_at_300_judgements():
    found = [
        biases(SimulatedLabeler(score=quality, length_bias=sign * 3.0, seed=seed), seed=seed)[1]
        for seed in range(10)
        for sign in (1, -1)
    ]
    assert np.mean([bias.alarm for bias in found]) >= 0.95
    assert all((bias.test.share > 0.5) == (number % 2 == 0) for number, bias in enumerate(found))


@pytest.mark.parametrize(("size", "tie_width"), [(2, 0.0), (4, 0.5)])
def test_unbiased_labellers_are_left_in_peace(size, tie_width):
    """False alarms at the 5 % level over 300 labellers: 5 % would be 15, and 27 is more than 3 standard errors above."""
    found = [
        biases(SimulatedLabeler(score=quality, seed=seed, tie_width=tie_width), count=30, size=size, seed=seed)
        for seed in range(300)
    ]
    assert sum(position.alarm for position, _ in found) <= 26
    assert sum(length.alarm for _, length in found) <= 26


def test_ten_unbiased_labellers_of_one_file_seldom_raise_any_alarm():
    raised = 0
    for seed in range(40):
        records = []
        for name in "abcdefghij":
            records += simulate_judgements(groups(15, 3, seed), SimulatedLabeler(score=quality, name=name, seed=seed))
        report = measure_agreement(records, num_draws=1)
        raised += any(labeler.position.alarm for labeler in report.labelers)
    # Without the correction for ten tests it would be about 16 of 40.
    assert raised <= 6


def test_noise_lowers_agreement_as_it_should():
    """Two labellers who each turn a share f of rankings round agree on f^2 + (1 - f)^2 of pairs; alpha falls with it."""
    found = {}
    for rate in (0.0, 0.1, 0.2, 0.5):
        records = []
        for name in ("ann", "bob"):
            labeler = SimulatedLabeler(score=quality, noise=0, name=name, flip_rate=rate)
            records += simulate_judgements(groups(500, size=3), labeler)
        report = measure_agreement(records, num_draws=100)
        expected = rate**2 + (1 - rate) ** 2
        assert report.agreement.low - 0.02 <= expected <= report.agreement.high + 0.02
        found[rate] = report
    # A list turned round has squared differences of positions twice those of any two lists: alpha = 1 - 2 (disagreement).
    for rate, report in found.items():
        for metric in ("ordinal", "interval"):
            assert report.alphas[metric].value == pytest.approx(2 * report.agreement.value - 1, abs=0.002)
        assert report.pairs[0].kappa.value == pytest.approx((1 - 2 * rate) ** 2, abs=0.12)
        assert report.passed is (rate < 0.2)


def test_gold_and_repeats_tell_a_careless_labeller(tmp_path):
    def item(group):
        order = sorted(range(2), key=lambda place: -quality(group.prompt, group.responses[place]))
        return Group(
            group_id=group.group_id,
            prompt=group.prompt,
            responses=group.responses,
            gold_ranks=tuple(order.index(place) + 1 for place in range(2)),
        )

    gold = [item(group) for group in groups(40, seed=9)]
    journal = Journal(tmp_path / "ranked.jsonl")
    for name, rate in (("careful", 0.05), ("careless", 0.45)):
        session = Session(groups(200), journal, labeler=name, gold=gold, repeats=0.2, gold_share=0.2)
        collect(session, SimulatedLabeler(score=quality, name=name, noise=0, flip_rate=rate))
    careful, careless = measure_agreement(journal.records, num_draws=100).labelers
    assert careful.gold_accuracy.count == careless.gold_accuracy.count == 40
    assert careful.gold_accuracy.value > 0.85 > 0.7 > careless.gold_accuracy.value
    # Two draws agree where neither or both are turned round.
    assert careful.self_agreement.value > 0.8
    assert careless.self_agreement.value < 0.7


def test_settings_out_of_range_are_named():
    for settings, message in (
        ({"noise": -1.0}, "noise is -1.0; give 0 or more"),
        ({"flip_rate": 1.5}, "flip_rate is 1.5; give a share"),
        ({"tie_width": -0.1}, "tie_width is -0.1"),
    ):
        with pytest.raises(ConfigError, match=message):
            SimulatedLabeler(score=quality, **settings)


def test_the_example_of_the_guide_runs(tmp_path, monkeypatch):
    guide = Path(__file__).parent.parent / "docs" / "preferences.md"
    (example,) = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), flags=re.DOTALL)
    (criterion,) = re.findall(r"```toml\n(.*?)```", guide.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "own.toml").write_text(criterion)
    assert load_criterion(str(tmp_path / "own.toml")).name == "concise"
    rows = [{"prompt": "p", "responses": ["long answer", "short"]}, {"prompt": "q", "responses": ["a", "bb"]}]
    (tmp_path / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert [sorted(record.ranks) for record in names["records"]] == [[1, 2], [1, 2]]
