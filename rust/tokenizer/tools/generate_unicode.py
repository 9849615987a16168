"""Write src/unicode/ranges.rs: the code points of \\p{L}, \\p{N} and \\s in the Unicode version that the peers use.

    python -m venv /tmp/unicode && /tmp/unicode/bin/pip install unicodedata2==16.0.0
    /tmp/unicode/bin/python rust/tokenizer/tools/generate_unicode.py

tiktoken 0.14 and tokenizers 0.23 were both measured to use Unicode 16.0; tests/test_tokenizer.py compares every code point.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import unicodedata2 as database

UNICODE_VERSION = "16.0.0"
MAX_CODE_POINT = 0x10FFFF
OUTPUT = Path(__file__).resolve().parent.parent / "src" / "unicode" / "ranges.rs"

# PropList.txt, White_Space: stable since Unicode 6.3. (Python's str.isspace also counts U+001C..U+001F, which are not in it.)
WHITE_SPACE = frozenset(
    [*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
)

HEADER = f"""\
//! Which code points are letters, numbers and white space: Unicode {UNICODE_VERSION}.
//!
//! Written by `rust/tokenizer/tools/generate_unicode.py`; change that script, not this file.

/// First and last code point of each run, in ascending order.
type Ranges = &'static [(u32, u32)];

/// The Unicode version of the tables below.
pub const VERSION: &str = "{UNICODE_VERSION}";
"""


def ranges(code_points: list[int]) -> list[tuple[int, int]]:
    """Runs of consecutive code points, as (first, last)."""
    runs = []
    for _, run in groupby(enumerate(code_points), key=lambda pair: pair[1] - pair[0]):
        members = [code_point for _, code_point in run]
        runs.append((members[0], members[-1]))
    return runs


def table(name: str, doc: str, code_points: list[int]) -> str:
    """A Rust constant, eight runs to a line."""
    runs = [f"(0x{first:X}, 0x{last:X})," for first, last in ranges(code_points)]
    lines = ["    " + " ".join(runs[i : i + 6]) for i in range(0, len(runs), 6)]
    body = "\n".join(lines)
    return (
        f"\n/// {doc}: {len(code_points)} code points.\n#[rustfmt::skip]\npub const {name}: Ranges = &[\n{body}\n];\n"
    )


def main() -> None:
    """Write the file."""
    if database.unidata_version != UNICODE_VERSION:
        raise SystemExit(f"unicodedata2 is {database.unidata_version}: install unicodedata2=={UNICODE_VERSION}")
    # A surrogate is no scalar value: it cannot occur in UTF-8.
    scalars = [c for c in range(MAX_CODE_POINT + 1) if not 0xD800 <= c <= 0xDFFF]
    letters = [c for c in scalars if database.category(chr(c)).startswith("L")]
    numbers = [c for c in scalars if database.category(chr(c)).startswith("N")]
    text = HEADER
    text += table("LETTERS", "General category L (`\\p{L}`)", letters)
    text += table("NUMBERS", "General category N (`\\p{N}`)", numbers)
    text += table("WHITE_SPACE", "Property `White_Space` (`\\s`)", sorted(WHITE_SPACE))
    OUTPUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
