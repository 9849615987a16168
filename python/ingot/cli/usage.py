"""Wrong usage told in one line, as all other mistakes are: tyro explains it in a box of several."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def in_one_line(prog: str) -> Iterator[None]:
    """What is written to standard error in here, before an exit, as one line that begins with ``prog``."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if stop.code not in (0, None):
            sys.stderr.write(tell(said.getvalue(), prog))
            raise
        sys.stderr.write(said.getvalue())
        raise
    sys.stderr.write(said.getvalue())


def tell(box: str, prog: str) -> str:
    """The line for a box: its message, and the nearest flag that it names.

    >>> box = " Unrecognized options\\n ----\\n  Unrecognized options: --sed, 3\\n  ----\\n  Perhaps you meant:\\n      --seed INT\\n"
    >>> tell(box, "ingot pretrain")
    'ingot pretrain: there is no flag --sed; did you mean --seed? ingot pretrain --help lists the flags\\n'
    """
    # The title stands in the upper edge or above it; then come the message and sections of help, with rules between them.
    sections: list[list[str]] = [[]]
    for line in [line.strip(" │╭╮╰╯\t") for line in box.splitlines()][1:]:
        if line.strip("─-"):
            sections[-1].append(line)
        elif sections[-1]:
            sections.append([])
    message = " ".join(sections[0])
    if not message:
        return box
    near = [match[0] for section in sections[1:] for line in section if (match := re.match(r"--[\w.-]+", line))]
    unknown = re.fullmatch(r"Unrecognized options?: (.*)", message)
    if unknown:
        given = unknown[1].split(", ")
        flags = [word for word in given if word.startswith("-")]
        message = f"there is no flag {flags[0]}" if flags else f"{given[0]!r} is not expected here"
        message += f"; did you mean {near[0]}?" if near and flags else ";"
    else:
        message = re.sub(r"^Error parsing [A-Za-z]\w*: ", "", message).rstrip(".") + ";"
        message = re.sub(r"^Missing from [\w ]+: ", "missing: ", message)
        message = re.sub(r"^Error parsing (--[\w.-]+): ", r"\1: ", message)
    return f"{prog}: {message} {prog} --help lists the flags\n"
