"""Unicode's normalization form C (UAX #15) as Hugging Face's ``tokenizers`` compute it: by the tables of Unicode 9.

What is assigned never changes its form, so the interpreter's newer tables differ only where characters that came after Unicode 9 move or
join their neighbours. To the older tables these are plain characters: a text is cut at them, and the parts are normalized by themselves.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata

# Characters that Unicode 9 moves by their combining class, or joins with the one before: code points and ranges, in hexadecimal.
_MOVING = """
300-34e 350-36f 483-487 591-5bd 5bf 5c1-5c2 5c4-5c5 5c7 610-61a 64b-65f 670 6d6-6dc 6df-6e4 6e7-6e8 6ea-6ed 711 730-74a
7eb-7f3 816-819 81b-823 825-827 829-82d 859-85b 8d4-8e1 8e3-8ff 93c 94d 951-954 9bc 9be 9cd 9d7 a3c a4d abc acd b3c b3e
b4d b56-b57 bbe bcd bd7 c4d c55-c56 cbc cc2 ccd cd5-cd6 d3e d4d d57 dca dcf ddf e38-e3a e48-e4b eb8-eb9 ec8-ecb f18-f19
f35 f37 f39 f71-f72 f74 f7a-f7d f80 f82-f84 f86-f87 fc6 102e 1037 1039-103a 108d 135d-135f 1714 1734 17d2 17dd 18a9
1939-193b 1a17-1a18 1a60 1a75-1a7c 1a7f 1ab0-1abd 1b34-1b35 1b44 1b6b-1b73 1baa-1bab 1be6 1bf2-1bf3 1c37 1cd0-1cd2
1cd4-1ce0 1ce2-1ce8 1ced 1cf4 1cf8-1cf9 1dc0-1df5 1dfb-1dff 20d0-20dc 20e1 20e5-20f0 2cef-2cf1 2d7f 2de0-2dff 302a-302f
3099-309a a66f a674-a67d a69e-a69f a6f0-a6f1 a806 a8c4 a8e0-a8f1 a92b-a92d a953 a9b3 a9c0 aab0 aab2-aab4 aab7-aab8
aabe-aabf aac1 aaf6 abed fb1e fe20-fe2f 101fd 102e0 10376-1037a 10a0d 10a0f 10a38-10a3a 10a3f 10ae5-10ae6 11046 1107f
110b9-110ba 11100-11102 11127 11133-11134 11173 111c0 111ca 11235-11236 112e9-112ea 1133c 1133e 1134d 11357 11366-1136c
11370-11374 11442 11446 114b0 114ba 114bd 114c2-114c3 115af 115bf-115c0 1163f 116b6-116b7 1172b 11c3f 16af0-16af4
16b30-16b36 1bc9e 1d165-1d169 1d16d-1d172 1d17b-1d182 1d185-1d18b 1d1aa-1d1ad 1d242-1d244 1e000-1e006 1e008-1e018
1e01b-1e021 1e023-1e024 1e026-1e02a 1e8d0-1e8d6 1e944-1e94a
"""


def is_nfc(text: str) -> bool:
    """Whether :func:`nfc` would leave a text as it is. True may be missed, False never is."""
    # Newer tables order and join more, so what is in form by them is so by the older ones.
    return text.isascii() or unicodedata.is_normalized("NFC", text)


def nfc(text: str) -> str:
    """The text in form C; lone surrogates stay.

    >>> nfc("e\u0301")
    'é'
    """
    if is_nfc(text):
        return text
    return "".join(unicodedata.normalize("NFC", part) for part in _newer().split(text))


@functools.cache
def _newer() -> re.Pattern[str]:
    """What the interpreter's tables move or join and those of Unicode 9 do not, as a group, so that a split keeps it."""
    known: set[int] = set()
    for entry in _MOVING.split():
        first, _, last = entry.partition("-")
        known.update(range(int(first, 16), int(last or first, 16) + 1))
    newer = set()
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if unicodedata.combining(character):
            newer.add(code)
        parts = unicodedata.decomposition(character).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            newer.add(int(parts[1], 16))
    return re.compile("([" + "".join(re.escape(chr(code)) for code in sorted(newer - known)) + "])")
