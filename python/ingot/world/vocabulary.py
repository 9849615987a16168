"""The words of the small world. Every word belongs to one list only, so a sentence can be read back without guessing."""

from __future__ import annotations

from typing import Final

PEOPLE: Final = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Kira", "Leo",
    "Mila", "Nora", "Oscar", "Paul", "Rosa", "Sara", "Tom", "Uma", "Vera", "Will", "Yara", "Zoe",
)  # fmt: skip
"""Heroes and their friends."""

THINGS: Final = (
    "kite", "ball", "drum", "lamp", "book", "coin", "rope", "boat", "mask", "ring", "cup", "hat",
    "key", "map", "doll", "bell", "flag", "vase", "clock", "shell", "stone", "basket", "candle", "whistle",
)  # fmt: skip
"""What a story is about, beside its hero."""

PLACES: Final = (
    "garden", "kitchen", "barn", "forest", "cave", "castle", "tower", "park", "mill", "shop", "school", "field",
    "valley", "tent", "hall", "cellar", "stable", "village", "harbor", "temple", "meadow", "bakery", "library", "desert",
)  # fmt: skip
"""Where people and things can be; each is said as "in the ..." and "to the ..."."""

TIMES: Final = ("morning", "day", "evening", "night")

PERSON_VERBS: Final = ("went", "ran", "walked", "hurried")
"""How a person gets to a place."""

THING_VERBS: Final = ("took", "moved", "carried", "brought")
"""How someone gets a thing to a place."""

ENDINGS: Final[dict[str, tuple[str, ...]]] = {
    "happy": ("laughed", "danced", "cheered", "sang"),
    "sad": ("cried", "wept", "sighed", "mourned"),
    "quiet": ("slept", "rested", "dreamed", "dozed"),
    "loud": ("shouted", "stamped", "growled", "roared"),
}
"""How a story can end, and the words that tell it."""

ENCOUNTERS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "animal": ("met", ("fox", "goat", "crow", "hare")),
    "food": ("shared", ("pie", "plum", "pear", "cake")),
    "music": ("heard", ("song", "tune", "harp", "horn")),
    "sky": ("saw", ("star", "cloud", "storm", "rainbow")),
}
"""What happens by the way: kind -> (verb, things met). The request does not ask for it; the reader decides which kinds are told."""

TOLD: Final[dict[str, tuple[str, str]]] = {
    "child": ("animal", "music"),
    "king": ("animal", "sky"),
    "farmer": ("food", "animal"),
    "baker": ("food", "music"),
    "sailor": ("music", "sky"),
    "poet": ("sky", "food"),
}
"""Reader -> the two kinds of encounter in stories for this reader, as often the one as the other. The reader likes the first, not the second."""

READERS: Final = tuple(TOLD)
