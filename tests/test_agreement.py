"""Agreement statistics: published worked examples, slow twins, and labellers whose faults are known."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ingot.cli import main
from ingot.errors import DataError
from ingot.feedback.agreement import measure_agreement
from ingot.feedback.coefficients import (
    Coincidences,
    cohen_kappa,
    confusion_table,
    fleiss_kappa,
    krippendorff_alpha,
)
from ingot.feedback.journal import Journal
from ingot.feedback.orderings import holm, ordering_test
from ingot.feedback.records import Record, with_id
from oracle import agreement as oracle

# Four coders, twelve units, seven values missing: the example that Krippendorff carries through "Computing Krippendorff's
# Alpha-Reliability" (2007, 2011), section C and D. He prints .743, .815, .849.
KRIPPENDORFF = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, None],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 3],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
# Thirty patients, six psychiatrists each, five diagnoses: Fleiss (1971), table 1; he prints .430.
FLEISS = """00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031 00501 30012 51000 02040
10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006"""


def units_of(table):
    return [[value for value in column if value is not None] for column in zip(*table, strict=True)]


@pytest.mark.parametrize(
    ("metric", "printed", "figure"),
    [("nominal", 0.743, 0.7434210526), ("ordinal", 0.815, 0.8153877787), ("interval", 0.849, 0.8491071429)],
)
def test_alpha_of_krippendorffs_own_example(metric, printed, figure):
    exact = oracle.alpha(units_of(KRIPPENDORFF), metric)
    assert round(float(exact), 3) == printed
    alpha = krippendorff_alpha(units_of(KRIPPENDORFF), metric)
    assert alpha == pytest.approx(figure, abs=1e-6)
    assert alpha == pytest.approx(float(exact), abs=1e-12)


def test_alpha_of_krippendorffs_binary_example():
    # Section A of the same paper: two observers, ten units, 0/1; he prints .095.
    first, second = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    alpha = krippendorff_alpha(list(zip(first, second, strict=True)), "nominal")
    assert alpha == pytest.approx(2 / 21, abs=1e-12)
    assert round(alpha, 3) == 0.095


def test_fleiss_kappa_of_the_psychiatric_diagnoses():
    counts = [[int(digit) for digit in row] for row in FLEISS.split()]
    assert len(counts) == 30
    assert {sum(row) for row in counts} == {6}
    # Column totals as printed there: 26, 26, 30, 55, 43.
    assert np.sum(counts, axis=0).tolist() == [26, 26, 30, 55, 43]
    kappa = fleiss_kappa(counts)
    # R's irr package, kappam.fleiss(diagnoses), gives 0.43024 for the same table.
    assert round(kappa, 5) == 0.43024
    cases = [[c for c, count in enumerate(row) for _ in range(count)] for row in counts]
    assert kappa == pytest.approx(float(oracle.fleiss(cases)), abs=1e-12)


@pytest.mark.parametrize(
    ("table", "printed", "exact"),
    [
        # Cohen's example as R's psych package quotes it (help of cohen.kappa): "Cohen reports .492".
        ([[0.44, 0.07, 0.09], [0.05, 0.20, 0.05], [0.01, 0.03, 0.06]], 0.492, Fraction(29, 59)),
        # Sexual fun (Agresti; R's vcd package prints 0.1293).
        ([[7, 7, 2, 3], [2, 8, 3, 7], [1, 5, 4, 9], [2, 8, 9, 14]], 0.129, None),
        # Gwet, Handbook of Inter-Rater Reliability (2014), 3 x 3, n = 100: 0.6765.
        ([[75, 1, 4], [5, 4, 1], [0, 0, 10]], 0.676, Fraction(23, 34)),
    ],
)
def test_cohens_kappa_of_published_tables(table, printed, exact):
    kappa = cohen_kappa(table)
    assert round(kappa, 3) == printed
    if exact is None:
        pairs = [(a, b) for a, row in enumerate(table) for b, count in enumerate(row) for _ in range(count)]
        exact = oracle.cohen(pairs)
    assert kappa == pytest.approx(float(exact), abs=1e-12)


categories = st.integers(0, 3)


@given(st.lists(st.tuples(categories, categories), min_size=1, max_size=30))
def test_cohens_kappa_against_its_twin(pairs):
    exact = oracle.cohen(pairs)
    assume(exact is not None)
    kappa = cohen_kappa(confusion_table([a for a, _ in pairs], [b for _, b in pairs]))
    assert kappa == pytest.approx(float(exact), abs=1e-9)


@given(st.integers(2, 5).flatmap(lambda n: st.lists(st.lists(categories, min_size=n, max_size=n), min_size=1)))
def test_fleiss_kappa_against_its_twin(cases):
    exact = oracle.fleiss(cases)
    assume(exact is not None)
    counts = [[case.count(category) for category in range(4)] for case in cases]
    assert fleiss_kappa(counts) == pytest.approx(float(exact), abs=1e-9)


@given(
    st.lists(st.lists(st.integers(-3, 5), max_size=5), max_size=12), st.sampled_from(["nominal", "ordinal", "interval"])
)
def test_alpha_against_its_twin(units, metric):
    exact = oracle.alpha(units, metric)
    alpha = krippendorff_alpha(units, metric)
    if exact is None:
        assert math.isnan(alpha)
    else:
        assert alpha == pytest.approx(float(exact), abs=1e-9)


@given(st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=6), st.data())
def test_alpha_with_weights_is_alpha_of_repeated_units(units, data):
    weights = data.draw(st.lists(st.integers(0, 3), min_size=len(units), max_size=len(units)))
    repeated = [unit for unit, times in zip(units, weights, strict=True) for _ in range(times)]
    weighted = Coincidences(units).alpha("ordinal", unit_weights=np.array(weights, dtype=np.float64))
    exact = oracle.alpha(repeated, "ordinal")
    if exact is None:
        assert math.isnan(weighted)
    else:
        assert weighted == pytest.approx(float(exact), abs=1e-9)


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_ordering_test_counts_arrangements(rankings):
    assert ordering_test(rankings).p_value == pytest.approx(float(oracle.ordering_p_value(rankings)), abs=1e-9)


def test_the_ordering_test_by_hand():
    # Ten pairs, the first always better: 2 / 2^10. One list of three with a tie: both untied pairs agree.
    test = ordering_test([[1, 2]] * 10)
    assert (test.share, test.num_pairs, test.num_groups) == (1.0, 10, 10)
    assert test.p_value == pytest.approx(2 / 1024)
    assert ordering_test([[1, 2, 2]]).share == 1.0
    assert ordering_test([[2, 1, 1]]).share == 0.0
    nothing = ordering_test([[1, 1, 1]])
    assert nothing.p_value == 1.0
    assert math.isnan(nothing.share)


def test_the_ordering_test_of_thousands_of_lists():
    """By the normal distribution with Kendall's variance, n (n - 1) (2 n + 5) / 18 less the same of each tie."""
    rng = np.random.default_rng(0)
    lists = [rng.permutation(4).tolist() for _ in range(3000)] + [
        rng.permutation([1, 1, 2]).tolist() for _ in range(3000)
    ]
    test = ordering_test(lists)
    variance = 3000 * (4 * 3 * 13 + 3 * 2 * 11 - 2 * 1 * 9) / 18
    z = abs((2 * test.share - 1) * test.num_pairs) / math.sqrt(variance)
    assert test.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)
    assert ordering_test([[1, 2, 3, 4]] * 3000).p_value == 1e-25


def test_holms_correction():
    # Holm (1979): the smallest times 3, the next times 2, never falling.
    assert holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []


def record(group, annotator, ranks, **more):
    responses = tuple(f"{group} answer {letter}" for letter in "abcdefghi"[: len(ranks)])
    prompt = more.pop("prompt", f"prompt of {group}")
    more.setdefault("criterion", "helpful")
    return with_id(
        Record(prompt=prompt, responses=responses, ranks=tuple(ranks), group_id=group, annotator=annotator, **more)
    )


def test_perfect_and_chance_agreement():
    rng = np.random.default_rng(1)
    same, chance = [], []
    for number in range(400):
        ranks = rng.integers(1, 4, 4).tolist()
        same += [record(f"g{number}", "ann", ranks), record(f"g{number}", "bob", ranks)]
        chance += [record(f"g{number}", "ann", ranks), record(f"g{number}", "bob", rng.integers(1, 4, 4).tolist())]
    report = measure_agreement(same, num_draws=50)
    assert report.agreement.value == report.strict_agreement.value == report.pairs[0].kappa.value == 1.0
    assert all(alpha.value == 1.0 for alpha in report.alphas.values())
    assert report.passed is True
    assert report.disputed == ()
    report = measure_agreement(chance, num_draws=200)
    for alpha in (*report.alphas.values(), report.fleiss, report.pairs[0].kappa):
        assert abs(alpha.value) < 0.06
        assert alpha.low < 0 < alpha.high
    assert report.passed is False
    assert "do not agree enough" in report.verdict


def test_the_order_in_which_a_row_lists_its_responses_does_not_matter():
    ann = [record(f"g{n}", "ann", [1, 2, 3]) for n in range(5)]
    bob = [record(f"g{n}", "bob", [1, 2, 3]) for n in range(5)]
    turned = [with_id(dataclasses.replace(row, responses=row.responses[::-1], ranks=row.ranks[::-1])) for row in bob]
    assert measure_agreement(ann + turned, num_draws=10).agreement.value == 1.0
    other = dataclasses.replace(bob[0], responses=("x", "y", "z"), id="other")
    with pytest.raises(DataError, match="group 'g0' has other responses in the judgement of 'bob'"):
        measure_agreement([*ann, other])


def test_kappa_does_not_depend_on_which_response_a_file_lists_first():
    """A file may list the better response first, always; that must not make agreement look like chance."""
    rng = np.random.default_rng(2)
    rows = []
    for number in range(400):
        better, turned = (1, 2), (2, 1)
        rows.append(record(f"g{number}", "ann", better if rng.random() < 0.95 else turned))
        rows.append(record(f"g{number}", "bob", better if rng.random() < 0.95 else turned))
    report = measure_agreement(rows, num_draws=10)
    # 0.905 of outcomes are equal, and by chance half would be.
    assert report.pairs[0].kappa.value == pytest.approx(0.81, abs=0.08)
    assert report.fleiss.value == pytest.approx(0.81, abs=0.08)


def test_ties_are_an_outcome_of_their_own():
    rows = [record("g", "ann", [1, 2, 3]), record("g", "bob", [1, 2, 2])]
    report = measure_agreement(rows)
    assert report.agreement.value == pytest.approx(2 / 3)
    assert report.strict_agreement.value == 1.0
    assert report.strict_agreement.count == 2
    ties = {labeler.name: labeler.ties for labeler in report.labelers}
    assert ties == {"ann": 0.0, "bob": pytest.approx(1 / 3)}
    # Positions of bob: 0, 0.75, 0.75.
    exact = oracle.alpha(
        [[Fraction(0), Fraction(0)], [Fraction(1, 2), Fraction(3, 4)], [1, Fraction(3, 4)]], "interval"
    )
    assert report.alphas["interval"].value == pytest.approx(float(exact))


def test_revised_and_skipped_judgements_do_not_count():
    wrong = record("g", "ann", [2, 1])
    rows = [
        wrong,
        record("g", "ann", [1, 1], status="withdrawn", revises=wrong.id),
        record("g", "ann", [1, 2], revises=wrong.id),
        record("h", "ann", [1, 1], status="skipped"),
        record("g", "bob", [1, 2]),
    ]
    report = measure_agreement(rows)
    assert (report.num_judgements, report.num_groups, report.agreement.value) == (2, 1, 1.0)


def test_self_agreement_and_gold():
    rows = [
        record("g", "ann", [1, 2, 3], gold_ranks=(1, 2, 2), kind="gold"),
        record("g", "ann", [1, 3, 2], kind="repeat", repeat=1),
        record("h", "ann", [1, 1, 2], gold_ranks=(1, 2, 3), kind="gold"),
        record("h", "bob", [1, 2, 3]),
    ]
    ann, bob = measure_agreement(rows).labelers
    assert ann.self_agreement.value == pytest.approx(2 / 3)
    # First item: both ordered pairs right; second: a tie (half) and two right.
    assert ann.gold_accuracy.value == pytest.approx((2 + 2.5) / 5)
    assert math.isnan(bob.self_agreement.value)
    assert math.isnan(bob.gold_accuracy.value)


def test_the_bootstrap_draws_prompts():
    """Copies of a prompt's group under other ids bring no certainty; as many other prompts do."""

    def rows(copies, prompt):
        rng = np.random.default_rng(3)
        found = []
        for number in range(30):
            a, b = rng.permutation(3) + 1, rng.permutation(3) + 1
            for copy in range(copies):
                for name, ranks in (("ann", a), ("bob", b if number % 2 else a)):
                    found.append(record(f"g{number}-{copy}", name, ranks.tolist(), prompt=prompt(number, copy)))
        return found

    def width(found):
        estimate = measure_agreement(found, num_draws=400).agreement
        return estimate.high - estimate.low

    once = width(rows(1, lambda n, c: f"p{n}"))
    assert width(rows(9, lambda n, c: f"p{n}")) == pytest.approx(once, rel=1e-9)
    assert width(rows(9, lambda n, c: f"p{n}-{c}")) == pytest.approx(once / 3, rel=0.25)


def test_intervals_hold_what_they_promise():
    """Of files made with a known chance to agree, about 95 % have it in their interval."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        rows = []
        for number in range(50):
            rows.append(record(f"g{number}", "ann", [1, 2]))
            rows.append(record(f"g{number}", "bob", [1, 2] if rng.random() < 0.7 else [2, 1]))
        estimate = measure_agreement(rows, num_draws=150, seed=seed).agreement
        covered += estimate.low <= 0.7 <= estimate.high
    assert 53 <= covered <= 60


def test_a_few_right_answers_are_no_certainty():
    rows = [record(f"g{n}", "ann", [1, 2], gold_ranks=(1, 2)) for n in range(10)]
    gold = measure_agreement(rows, num_draws=20).labelers[0].gold_accuracy
    # Clopper and Pearson's bound for 10 of 10, as in their tables: 0.692.
    assert (gold.value, round(gold.low, 3), gold.high) == (1.0, 0.692, 1.0)
    wrong = [record(f"g{n}", "ann", [2, 1], gold_ranks=(1, 2)) for n in range(10)]
    gold = measure_agreement(wrong, num_draws=20).labelers[0].gold_accuracy
    assert (gold.value, gold.low, round(gold.high, 3)) == (0.0, 0.0, 0.308)


def test_the_most_disputed_groups_come_first():
    rows = [
        record("calm", "ann", [1, 2, 3]),
        record("calm", "bob", [1, 2, 3]),
        record("some", "ann", [1, 2, 3]),
        record("some", "bob", [1, 3, 2]),
        record("worst", "ann", [1, 2, 3]),
        record("worst", "bob", [3, 2, 1]),
    ]
    report = measure_agreement(rows)
    assert [(d.group_id, pytest.approx(d.disagreement)) for d in report.disputed] == [("worst", 1.0), ("some", 1 / 3)]
    assert report.disputed[0].labelers == ("ann", "bob")
    assert len(measure_agreement(rows, num_disputed=1).disputed) == 1


def test_the_odd_one_out_is_told():
    rng = np.random.default_rng(4)
    rows = []
    for number in range(60):
        ranks = (rng.permutation(3) + 1).tolist()
        for name in ("ann", "bob"):
            rows.append(record(f"g{number}", name, ranks))
        rows.append(record(f"g{number}", "odd", (rng.permutation(3) + 1).tolist()))
    report = measure_agreement(rows, num_draws=10)
    without = {labeler.name: labeler.alpha_without for labeler in report.labelers}
    assert without["odd"] == 1.0 > report.alphas["ordinal"].value > max(without["ann"], without["bob"])
    # Of two, one is left: nothing to say.
    two = measure_agreement([row for row in rows if row.annotator != "odd"], num_draws=10)
    assert all(math.isnan(labeler.alpha_without) for labeler in two.labelers)


def test_one_person_cannot_agree_with_others():
    report = measure_agreement([record("g", "ann", [1, 2])])
    assert report.passed is None
    assert "a second person" in report.verdict
    apart = measure_agreement([record("g", "ann", [1, 2]), record("h", "bob", [1, 2])])
    assert apart.passed is None
    assert "No group was judged by two people" in apart.verdict


def write(path, rows):
    Journal(path).append(*rows)
    return path


def test_the_command(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        ranks = rng.permutation(3) + 1
        for name in ("ann", "b\x1b[31mob"):
            noisy = ranks if rng.random() < 0.9 else rng.permutation(3) + 1
            rows.append(
                record(f"g{number}", name, noisy.tolist(), order=tuple(rng.permutation(3).tolist()), time_s=4.0)
            )
    path = write(tmp_path / "ranked.jsonl", rows)
    assert main(["agreement", str(path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "People agree: alpha 0." in printed
    assert "\x1b" not in printed
    assert "b\\x1b[31mob" in printed
    for words in ("Krippendorff's alpha, ordinal", "Cohen's kappa", "Label again", "same again"):
        assert words in printed
    assert main(["agreement", str(path), "--json", "--gate", "0.99"]) == 1
    report = json.loads(capsys.readouterr().out)
    (criterion,) = report["criteria"]
    assert criterion["criterion"] == "helpful"
    assert criterion["passed"] is False
    assert criterion["labelers"][0]["gold_accuracy"]["value"] is None
    assert criterion["labelers"][0]["median_time_s"] == 4.0


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    assert main(["agreement", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl: no such file; `ingot label` makes it" in capsys.readouterr().err
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "p", "responses": ["a", "b"], "ranks": [1]}\n')
    assert main(["agreement", str(path)]) == 1
    assert 'bad.jsonl, row 1: "ranks" has 1 entries for 2 responses' in capsys.readouterr().err
    path.write_text("")
    assert main(["agreement", str(path)]) == 1
    assert "bad.jsonl: no judgements in it" in capsys.readouterr().err
    path = write(tmp_path / "good.jsonl", [record("g", "ann", [1, 2])])
    assert main(["agreement", str(path), "--criterion", "honest"]) == 1
    assert "good.jsonl: no judgement about 'honest'" in capsys.readouterr().err
