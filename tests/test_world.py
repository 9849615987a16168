"""The small world: exact probabilities, a real split, questions that need the story, a preference that needs prompt and story."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot import world
from ingot.world.grammar import ENTITIES
from ingot.world.vocabulary import (
    ENCOUNTERS,
    ENDINGS,
    PEOPLE,
    PERSON_VERBS,
    PLACES,
    READERS,
    THING_VERBS,
    THINGS,
    TIMES,
    TOLD,
)

CHANCE = 0.40
JUDGE = 0.70


@pytest.fixture(scope="module")
def training():
    return list(world.documents(0, "train", 6000))


@pytest.fixture(scope="module")
def held_out():
    return list(world.documents(0, "held_out", 3000))


# Probabilities


def test_every_story_has_the_probability_of_its_text(held_out):
    for document in held_out:
        story = document.story
        request, facts = world.parse_request(story.prompt), world.parse_story(story.text)
        assert (request, facts) == (story.request, story.facts)
        assert world.log_probability(request, facts) == pytest.approx(story.log_probability, abs=1e-9)
        assert document.log_probability == pytest.approx(story.log_probability - math.log(6), abs=1e-12)


def test_probabilities_of_all_continuations_add_up_to_one():
    """Everything up to the moves fixed, and everything after them: the moves that can be told must share out the rest exactly."""
    story = next(world.stories(3, "train"))
    request, facts = story.request, story.facts
    free = [place for place in PLACES if place not in (facts.place, facts.friend_place)]
    total, texts = 0.0, set()
    for entities in itertools.product(ENTITIES, repeat=2):
        for places in itertools.permutations(free, 2):
            for verbs in itertools.product(range(4), repeat=2):
                moves = tuple(
                    world.Move(entity, (THING_VERBS if entity == "thing" else PERSON_VERBS)[verb], place)
                    for entity, verb, place in zip(entities, verbs, places, strict=True)
                )
                told = dataclasses.replace(facts, moves=moves)
                total += math.exp(world.log_probability(request, told))
                texts.add(told.text)
    assert len(texts) == (3 * 4) ** 2 * len(free) * (len(free) - 1)
    before = len(READERS) * len(world.combinations("train")) * len(ENDINGS) * len(TIMES) * 23 * 23
    number_of_moves, after = 3, 8 * 2 * 4
    assert total == pytest.approx(1 / (before * number_of_moves * after), rel=1e-9)


def test_mean_surprise_is_the_entropy():
    """The entropy of a story, from the lengths of the lists alone, against the mean over many samples."""
    moves = [math.log(3 * 4 * (22 - number)) for number in range(4)]
    expected = math.log(6 * 4 * 4 * 23 * 23 * 3 * 8 * 2 * 4) + math.log(len(world.combinations("held_out")))
    expected += sum(sum(moves[:count]) for count in (2, 3, 4)) / 3
    surprises = [-story.log_probability for story in world.stories(9, "held_out", 20_000)]
    error = np.std(surprises) / math.sqrt(len(surprises))
    assert abs(np.mean(surprises) - expected) < 4 * error


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_choices_are_uniform(split):
    stories = list(world.stories(1, split, 20_000))
    draws = {
        "reader": ([story.request.reader for story in stories], len(READERS)),
        "ending": ([story.facts.ending for story in stories], len(ENDINGS)),
        "friend": ([story.facts.friend for story in stories], len(PEOPLE)),
        "friend_place": ([story.facts.friend_place for story in stories], len(PLACES)),
        "moves": ([len(story.facts.moves) for story in stories], 3),
        "moved": ([move.entity for story in stories for move in story.facts.moves], 3),
        "last_place": ([story.facts.moves[-1].place for story in stories], len(PLACES)),
        "encountered": ([story.facts.encountered for story in stories], 16),
        "together": ([story.facts.together for story in stories], 2),
        "order": ([document.questions[0].entity for document in world.documents(1, split, 5000)], 3),
    }
    for name, (values, size) in draws.items():
        counts = Counter(values)
        assert len(counts) == size, name
        expected = len(values) / size
        chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
        assert chi_square < size - 1 + 5 * math.sqrt(2 * (size - 1)) + 5, name


def test_what_cannot_be_told_has_no_probability():
    story = next(world.stories(0, "train"))
    request, facts = story.request, story.facts
    impossible = [
        dataclasses.replace(facts, friend=facts.who),
        dataclasses.replace(facts, friend_place=facts.place),
        dataclasses.replace(facts, moves=facts.moves[:1]),
        dataclasses.replace(facts, moves=(facts.moves[0],) * 2),
        dataclasses.replace(facts, thing=next(thing for thing in THINGS if thing != facts.thing)),
        dataclasses.replace(facts, ending=next(ending for ending in ENDINGS if ending != facts.ending)),
    ]
    assert math.isfinite(world.log_probability(request, facts))
    assert [world.log_probability(request, told) for told in impossible] == [-math.inf] * len(impossible)


# The split


def test_sides_share_no_combination_but_everything_smaller():
    train, held_out = set(world.combinations("train")), set(world.combinations("held_out"))
    assert not train & held_out
    assert len(train) + len(held_out) == len(PEOPLE) * len(THINGS) * len(PLACES)
    assert 0.45 < len(train) / (len(train) + len(held_out)) < 0.55
    for first, second in itertools.combinations(range(3), 2):
        assert {(one[first], one[second]) for one in train} >= {(one[first], one[second]) for one in held_out}


def test_stories_keep_to_their_side(training, held_out):
    for documents, split in ((training, "train"), (held_out, "held_out")):
        facts = [document.story.facts for document in documents]
        assert {world.split_of(told.who, told.thing, told.place) for told in facts} == {split}


# Determinism


def test_the_same_on_every_machine_and_python():
    digest = hashlib.sha256()
    for split in ("train", "held_out"):
        for document in world.documents(5, split, 600):
            digest.update(document.text.encode())
    assert digest.hexdigest() == "15eac505c575f3638559ee95aab4042c01dd1edb53b7d475f24d63a7ba49f37c"


def test_a_story_depends_on_its_number_alone():
    whole = list(world.documents(2, "train", 700))
    assert list(world.documents(2, "train", 5, start=600)) == whole[600:605]
    assert list(world.documents(2, "train", 3, start=255)) == whole[255:258]
    assert whole[0] != next(world.documents(3, "train"))


def test_no_word_is_in_two_lists():
    lists = [PEOPLE, THINGS, PLACES, TIMES, PERSON_VERBS, THING_VERBS, READERS, *ENDINGS.values()]
    lists += [words for _, words in ENCOUNTERS.values()]
    words = [word for each in lists for word in each]
    assert len(words) == len(set(words))


# Questions


def test_answers_are_what_the_text_says_last(held_out):
    """An independent reader: the last sentence that moves or places the name."""
    for document in held_out[:1000]:
        sentences = document.story.text.split(". ")
        for question in document.questions:
            name = re.fullmatch(r"Where is (?:the )?(\w+) now\?", question.text)[1]
            places = [
                re.search(r"(?:in|to) the (\w+)", sentence)[1]
                for sentence in sentences
                if re.search(rf"\b{name}\b", sentence) and re.search(r"(?:in|to) the \w+", sentence)
            ]
            assert question.answer in (f"{name} is in the {places[-1]}.", f"The {name} is in the {places[-1]}.")


def test_guessing_does_not_answer_questions(training, held_out):
    shares = world.baselines(training, held_out)
    assert set(shares) == {"most_frequent", "without_story", "last_mentioned"}
    assert max(shares.values()) <= CHANCE


@pytest.mark.parametrize("entity", ENTITIES)
@pytest.mark.parametrize("position", [0, 1, 2, 3, -1, -2, -3])
def test_no_position_in_the_story_gives_the_answer(held_out, entity, position):
    right = [
        question.place == document.story.facts.places_mentioned()[position]
        for document in held_out
        for question in document.questions
        if question.entity == entity
    ]
    assert np.mean(right) <= CHANCE


# Exercises

_SAYS = re.compile(
    r"(?:The )?(?P<was>\w+) was in the (?P<first>\w+)\."
    r"|(?P<goes>[A-Z]\w+) (?:went|ran|walked|hurried) to the (?P<to>\w+)\."
    r"|Someone (?:took|moved|carried|brought) the (?P<thing>\w+) to the (?P<there>\w+)\."
    r"|(?:Where is (?:the )?(?P<asked>\w+) now\? )?(?:The )?(?P<now>\w+) is in the (?P<place>\w+)\."
)


def test_exercises_say_where_everything_is_and_nothing_else():
    """Read back sentence by sentence, each reminder and answer is what the sentences before it say."""
    kinds: Counter[str] = Counter()
    for text in world.exercises(2, 1500):
        where: dict[str, str] = {}
        end = 0
        for said in _SAYS.finditer(text):
            assert said.start() - end == (end > 0), text
            end = said.end()
            if said["was"]:
                assert said["was"] not in where
                where[said["was"]] = said["first"]
            elif said["goes"] or said["thing"]:
                name, place = said["goes"] or said["thing"], said["to"] or said["there"]
                assert where[name] != place
                where[name] = place
                kinds["move"] += 1
            else:
                assert said["asked"] in (None, said["now"])
                assert where[said["now"]] == said["place"]
                kinds["question" if said["asked"] else "reminder"] += 1
        assert end == len(text)
        assert 2 <= len(where) <= 4
        assert set(where) <= set(PEOPLE) | set(THINGS)
    total = sum(kinds.values())
    assert 8 <= total / 1500 <= 15
    for kind, share in {"move": 0.3, "question": 0.2, "reminder": 0.5}.items():
        assert kinds[kind] / total == pytest.approx(share, abs=0.02)


def test_an_exercise_depends_on_its_number_alone():
    some = list(world.exercises(4, 600))
    assert list(world.exercises(4, 3, start=511)) == some[511:514]
    assert len(set(some)) == 600
    assert list(world.exercises(5, 600)) != some
    # The same on every machine and Python.
    assert hashlib.sha256("\n".join(some).encode()).hexdigest().startswith("a80a5d1517cdbea4")


# Preference


def pairs(seed, count):
    """Two stories that do what the same first line asks, one of which pleases its reader, in random order."""
    random = np.random.default_rng(seed)
    for story, other in zip(
        world.stories(seed, "held_out", count), world.stories(seed + 1, "held_out", count), strict=True
    ):
        facts = story.facts
        encounter = dataclasses.replace(
            other.facts,
            who=facts.who,
            thing=facts.thing,
            place=facts.place,
            ending=facts.ending,
            last_word=facts.last_word,
        )
        if world.log_probability(story.request, encounter) == -math.inf:
            continue
        preferred = world.prefers(story.prompt, story.text, encounter.text)
        if preferred:
            texts = (story.text, encounter.text)
            yield story.prompt, *(texts if random.random() < 0.5 else texts[::-1])


def agreement(features, seed=11):
    """Held-out agreement of the best linear judge of such features with the world's rule."""

    def matrix(seed, count):
        rows, signs = [], []
        for prompt, a, b in pairs(seed, count):
            rows.append(features(prompt, a) - features(prompt, b))
            signs.append(world.prefers(prompt, a, b))
        return np.array(rows, float), np.array(signs, float)

    x, y = matrix(seed, 6000)
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
    x, y = matrix(seed + 100, 3000)
    return float(np.mean(np.sign(x @ weights + 1e-12) == y))


def words_of(texts):
    return {
        word: number
        for number, word in enumerate(sorted({word for text in texts for word in re.findall(r"\w+", text)}))
    }


VOCABULARY = words_of(story.text for story in world.stories(4, "train", 3000))
ENCOUNTERED = [word for _, words in ENCOUNTERS.values() for word in words]


def word_counts(prompt, story):
    counts = np.zeros(len(VOCABULARY))
    for word in re.findall(r"\w+", story):
        counts[VOCABULARY[word]] += 1
    return counts


def test_length_does_not_tell_the_better_story():
    assert agreement(lambda prompt, story: np.array([len(story), len(story.split())])) <= JUDGE


def test_words_of_the_answer_do_not_tell_the_better_story():
    assert agreement(word_counts) <= JUDGE


def test_prompt_and_story_together_do():
    """The same judge with the reader crossed with the encounter finds the rule: it is there to be learned."""

    def crossed(prompt, story):
        features = np.zeros((len(READERS), len(ENCOUNTERED)))
        reader = world.parse_request(prompt).reader
        features[READERS.index(reader), ENCOUNTERED.index(world.parse_story(story).encountered)] = 1
        return features.ravel()

    assert agreement(crossed) >= 0.99


def test_half_of_the_stories_please_and_each_kind_is_told_to_half_of_the_readers(held_out):
    share = np.mean([world.pleases(document.story.prompt, document.story.text) for document in held_out])
    assert 0.46 < share < 0.54
    assert Counter(kind for kinds in TOLD.values() for kind in kinds) == dict.fromkeys(ENCOUNTERS, 3)
    # What pleases one reader is told to another who does not like it.
    assert {liked for liked, _ in TOLD.values()} == {disliked for _, disliked in TOLD.values()} == set(ENCOUNTERS)


def test_a_story_of_a_kind_that_its_reader_is_not_told_is_none_of_the_world(held_out):
    for document in held_out[:200]:
        story = document.story
        for kind, (_, words) in ENCOUNTERS.items():
            told = dataclasses.replace(story.facts, encounter=kind, encountered=words[0])
            possible = world.log_probability(story.request, told) > -math.inf
            assert possible == (kind in TOLD[story.request.reader])


def test_preference_is_antisymmetric_and_puts_the_request_first():
    for prompt, a, b in pairs(21, 200):
        assert world.prefers(prompt, a, b) == -world.prefers(prompt, b, a)
        assert world.prefers(prompt, a, a) == 0
        worse = a if world.pleases(prompt, a) is False else b
        assert world.prefers(prompt, worse, "They met a fox.") == 1
        assert world.prefers(prompt, "", worse) == -1
    with pytest.raises(ValueError, match="not a first line"):
        world.prefers("Once upon a time", "a", "b")


# The judge


def test_the_judge_finds_each_failure():
    story = next(world.stories(0, "train"))
    request, facts = story.request, story.facts
    others = {
        "who": dataclasses.replace(facts, who=next(p for p in PEOPLE if p not in (facts.who, facts.friend))),
        "where": dataclasses.replace(facts, place=next(p for p in PLACES if p not in facts.places_mentioned())),
        "thing": dataclasses.replace(facts, thing=next(thing for thing in THINGS if thing != facts.thing)),
        "ending": dataclasses.replace(facts, last_word=next(w for e, w in ENDINGS.items() if e != facts.ending)[0]),
    }
    assert set(others) == set(world.ASPECTS)
    right = world.check(story.text, request)
    assert right.well_formed
    assert right.possible
    assert right.follows_all
    for aspect, told in others.items():
        found = world.check(told.text, request)
        assert found.well_formed
        assert not found.possible
        assert [name for name, done in found.follows.items() if not done] == [aspect]


def test_the_judge_sees_sentences_that_are_none():
    story = next(world.stories(0, "train"))
    sentences = story.text.split(". ")
    for broken in (
        story.text.replace("was in the", "was the"),
        story.text[:-1],
        story.text + " And",
        story.text.replace(story.facts.friend, story.facts.thing),
    ):
        found = world.check(broken, story.request)
        assert not found.well_formed
        assert not found.possible
    shuffled = ". ".join([sentences[1], sentences[0], *sentences[2:]])
    assert world.check(shuffled, story.request).well_formed
    assert not world.check(shuffled, story.request).possible


@given(st.text() | st.text(alphabet=". Anaoin the\n"))
def test_the_judge_takes_any_text(text):
    found = world.check(text, next(world.stories(0, "train")).request)
    assert 0 <= found.num_well_formed <= found.num_sentences
    assert not found.possible


def test_scores_show_collapse_and_copies(training, held_out):
    requests = [document.story.request for document in held_out[:200]]
    texts = [document.story.text for document in held_out[:200]]
    known = [document.story.text for document in training]
    good = world.score_samples(requests, texts, known)
    assert (good.well_formed, good.distinct, good.copied, good.possible) == (1.0, 1.0, 0.0, 1.0)
    assert set(good.follows_request.values()) == {1.0}
    same = world.score_samples(requests, [known[0]] * 200, known)
    assert (same.distinct, same.copied) == (1 / 200, 1.0)
    assert same.follows_request["all"] == 0.0
    with pytest.raises(ValueError, match="as many"):
        world.score_samples(requests, texts[:-1])
