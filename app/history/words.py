"""Text as the search index holds it, and what a person types to find it.

Case, accents, vowel points, widths and line breaks make no difference. Scripts without spaces
between words, and emoji, are taken apart into characters, each a word of its own, so that any part
of such text is found as a phrase.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from app.history.text import sound

TOKENIZER = "unicode61 remove_diacritics 0 categories 'L* N* M* So Co'"
"""What the index makes words of: all that `prepared` leaves but punctuation. Marks are part of a
word, which in Indic scripts they are."""

SHORTEST_PREFIX = 3
"""Of a shorter word the index finds the whole word alone: too much begins with "a"."""

MAX_QUERY_CHARACTERS = 500
MAX_TERMS = 16

# Combining accents, Hebrew points, Arabic vowel signs and tatweel, joiners and directions,
# variation selectors, zero bytes.
_LEFT_OUT = re.compile(
    "[\u0300-\u036f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640"
    "\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed"
    "\u200b-\u200f\u202a-\u202e\u2060\ufe00-\ufe0f\0]"
)
# Thai, Lao, Myanmar, Khmer; symbols; CJK radicals, punctuation, kana, ideographs; emoji.
_ALONE = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2190-\u2bff\u2e80-\u30ff\u31c0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U0001f000-\U0001faff\U00020000-\U0003ffff])"
)
_TERM = re.compile(r'["“”„]([^"“”„]*)["“”„]|(\S+)')


def folded(text: str) -> str:
    """`text` without what makes no difference; `prepared` before characters are set apart."""
    if text.isascii():
        return text.lower().replace("\0", "")
    # Twice: what compatibility characters stand for has a case too.
    once = unicodedata.normalize("NFKD", text).casefold()
    bare = _LEFT_OUT.sub("", unicodedata.normalize("NFKD", once))
    return unicodedata.normalize("NFC", bare)


def prepared(text: str) -> str:
    """`text` as the index holds it: one line, single spaces."""
    plain = folded(text)
    if not plain.isascii():
        plain = _ALONE.sub(r" \1 ", plain)
    return " ".join(plain.split())


@dataclass(frozen=True)
class Query:
    """What a person typed, taken apart. Nothing in it is an operator but double quotes, which keep
    words together."""

    terms: tuple[str, ...]
    """Each as `prepared` makes it; all of them must be in a text."""

    @classmethod
    def parse(cls, text: str) -> Query:
        found = (
            quoted or bare for quoted, bare in _TERM.findall(sound(text[:MAX_QUERY_CHARACTERS]))
        )
        terms = dict.fromkeys(filter(None, map(prepared, found)))
        return cls(tuple(terms)[:MAX_TERMS])

    @property
    def match(self) -> str:
        """For MATCH: texts in which a word, or a row of words, begins like each term. Empty where
        the index has nothing to go by, as for "->"."""
        words = [term for term in self.terms if any(map(_is_indexed, term))]
        return " AND ".join(
            f'"{term.replace(chr(34), " ")}"{" *" * _is_prefix(term)}' for term in words
        )

    @property
    def exact(self) -> list[str]:
        """The terms with characters that the index leaves out, which it therefore cannot tell from
        others: "c++" and "c"."""
        return [term for term in self.terms if not all(c == " " or c.isalnum() for c in term)]


def _is_prefix(term: str) -> bool:
    last = re.split(r"\W", term.rstrip())[-1]
    return len(last) >= SHORTEST_PREFIX


def _is_indexed(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character) == "So"
