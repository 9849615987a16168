"""The small world: stories without end, with exact probabilities, questions, a rule of preference, and a judge for what models write.

>>> from ingot import world
>>> story = next(world.stories(seed=0, split="train"))
>>> world.check(story.text, story.request).follows_all
True
"""

from ingot.world.check import ASPECTS, Check, Scores, check, parse_request, parse_story, score_samples
from ingot.world.exercises import exercises
from ingot.world.grammar import Facts, Move, Request, Split, Story, combinations, log_probability, split_of, stories
from ingot.world.preference import merit, pleases, prefers
from ingot.world.questions import Document, Question, baselines, documents, questions

__all__ = [
    "ASPECTS",
    "Check",
    "Document",
    "Facts",
    "Move",
    "Question",
    "Request",
    "Scores",
    "Split",
    "Story",
    "baselines",
    "check",
    "combinations",
    "documents",
    "exercises",
    "log_probability",
    "merit",
    "parse_request",
    "parse_story",
    "pleases",
    "prefers",
    "questions",
    "score_samples",
    "split_of",
    "stories",
]
