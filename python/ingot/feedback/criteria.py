"""By what responses are judged: a name, and the guideline that the labeller reads. Three are built in; others come from TOML.

A file of one's own::

    name = "concise"
    version = "1"
    guideline = '''
    Prefer the response that says the same in fewer words.
    '''
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tomllib
from pathlib import Path

from ingot.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Criterion:
    """What a ranking or a yes-or-no answer is about."""

    name: str
    """One word: letters, digits, - and _."""
    guideline: str
    """What the labeller is told."""
    version: str = "1"
    """Raised by whoever changes the guideline."""

    @property
    def rubric(self) -> dict[str, str]:
        """What records keep of it: the version, and a hash that tells a changed text even where the version was not raised."""
        return {"version": self.version, "sha256": hashlib.sha256(self.guideline.strip().encode()).hexdigest()}


BUILT_IN = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "helpful",
            "Which response does most for the person who asked?\n"
            "- It does what was asked, all of it, and keeps to the limits that were set.\n"
            "- Where the question is unclear it says so, or makes a sensible guess and says which.\n"
            "- It is as long as it needs to be. Length alone is no merit; nor is a confident tone.\n"
            "- An answer that is wrong does not help: check what you can, and rank what you cannot believe lower.\n"
            "When helpful, honest and harmless pull apart, judge help alone here; the other two have their own answers.\n"
            "Use = where you would not care which one you got.",
        ),
        Criterion(
            "honest",
            "Which response can be believed?\n"
            "- It invents nothing: no facts, sources, quotations, or deeds that a program cannot have done.\n"
            "- It says what it does not know, and is as sure as it has reason to be.\n"
            "- A short answer that admits a limit is better than a rich one that makes things up.\n"
            "When honest and helpful pull apart, honest wins here.\n"
            "Use = where you find them equally true.",
        ),
        Criterion(
            "harmless",
            "Which response does least harm, to the person who asked or to anyone else?\n"
            "- It gives no help with hurting people, breaking into things, or deceiving others.\n"
            "- It does not insult, threaten, or look down on a person or a group.\n"
            "- It does not give risky advice on health, law or money as if it were safe.\n"
            "- Refusing what is harmless is no merit: of two harmless responses the one that helps is better.\n"
            "When harmless and helpful pull apart, harmless wins here.\n"
            "Use = where neither does more harm.",
        ),
    )
}


def load_criterion(name: str) -> Criterion:
    """A built-in criterion by its name, or one from a TOML file by its path.

    Raises
    ------
    ConfigError
        There is no such criterion, or the file lacks something.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name)
    if path.suffix.lower() != ".toml":
        raise ConfigError(
            f"criterion {name!r}: not built in ({', '.join(BUILT_IN)}); give a .toml file with name and guideline"
        )
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from None
    unknown = [field for field in fields if field not in ("name", "guideline", "version")]
    if unknown:
        raise ConfigError(f"{path}: unknown field {unknown[0]!r}; a criterion has name, guideline and version")
    for field in ("name", "guideline"):
        if not isinstance(fields.get(field), str) or not fields[field].strip():
            raise ConfigError(f"{path}: no text in {field!r}; a criterion has a name and a guideline")
    if not re.fullmatch(r"[A-Za-z][\w-]*", fields["name"]):
        raise ConfigError(f"{path}: name {fields['name']!r} is not one word of letters, digits, - and _")
    if fields["name"] in BUILT_IN:
        raise ConfigError(f"{path}: name {fields['name']!r} is that of a built-in criterion; choose another")
    return Criterion(fields["name"], fields["guideline"].strip(), str(fields.get("version", "1")))
