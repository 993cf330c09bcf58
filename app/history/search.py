"""Full-text search over all chats: what titles and messages say, not what models thought."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence

from app.history.records import SearchHit, Snippet
from app.history.store import History
from app.history.words import Query, folded

SNIPPET_CHARACTERS = 120
_RANKED = 1000
_USUAL_LENGTH = 500
# Beyond this the place of a hit is not looked for character by character.
_MAX_SLOW_CHARACTERS = 20_000


def search(
    history: History, text: str, *, limit: int = 50, conversation: int | None = None
) -> list[SearchHit]:
    """Titles and messages in which all words of `text` are, in any order.

    Case, accents and vowel points make no difference, double quotes keep words together, and
    nothing else is special. Titles come first, then messages in which words begin so (or, below
    three letters, are so), of the newest thousand the most telling first; where these are fewer
    than `limit`, those in which they are only part of other words, newest first.

    Args:
        limit: How many messages at most, and how many titles.
        conversation: Search this chat alone.

    Raises:
        GryphonError: the file cannot be read.
    """
    query = Query.parse(text)
    if not query.terms or limit < 1:
        return []
    with history.database.reading() as db:
        titles = _find(db, "conversation", query, limit, conversation)
        messages = _find(db, "message", query, limit, conversation)
        return [
            *(_title_hit(db, id, query) for id in titles),
            *(_message_hit(db, id, query) for id in messages),
        ]


def _find(
    db: sqlite3.Connection, kind: str, query: Query, limit: int, conversation: int | None
) -> list[int]:
    """The ids of what fits, in the order of `search`."""
    words = f"{kind}_words"
    only = ""
    values: tuple[int, ...] = ()
    if conversation is not None:
        column = "id" if kind == "conversation" else "conversation"
        only = f" AND rowid IN (SELECT id FROM {kind} WHERE {column} = ?)"
        values = (conversation,)
    found: list[int] = []
    if query.match:
        exact = " AND instr(body, ?)" * len(query.exact)
        # Not FTS5's own rank: it looks at every match before it gives the first.
        matches = db.execute(
            f"SELECT rowid, body FROM {words} WHERE {words} MATCH ?{exact}{only} "
            "ORDER BY rowid DESC LIMIT ?",
            (query.match, *query.exact, *values, max(_RANKED, limit)),
        ).fetchall()
        matches.sort(key=lambda row: -_weight(row[1], query.terms))
        found = [id for id, _ in matches[:limit]]
    if len(found) < limit:
        inside = " AND ".join(["instr(body, ?)"] * len(query.terms))
        rows = db.execute(
            f"SELECT rowid FROM {words} WHERE {inside}{only} ORDER BY rowid DESC LIMIT ?",
            (*query.terms, *values, limit + len(found)),
        )
        known = set(found)
        found += [id for (id,) in rows if id not in known]
    return found[:limit]


def _weight(body: str, terms: Sequence[str]) -> float:
    """How much a text is about the terms: as bm25 has it, where all terms are in every text."""
    length = 0.25 + 0.75 * len(body) / _USUAL_LENGTH
    counts = [f" {body}".count(f" {term}") for term in terms]
    return sum(count / (count + 1.2 * length) for count in counts)


def _title_hit(db: sqlite3.Connection, id: int, query: Query) -> SearchHit:
    title, updated = db.execute(
        "SELECT title, updated FROM conversation WHERE id = ?", (id,)
    ).fetchone()
    return SearchHit(id, title, None, None, updated, snippet(title, query.terms))


def _message_hit(db: sqlite3.Connection, id: int, query: Query) -> SearchHit:
    row = db.execute(
        "SELECT conversation.id, title, role, content, message.created FROM message "
        "JOIN conversation ON conversation.id = message.conversation WHERE message.id = ?",
        (id,),
    ).fetchone()
    chat, title, role, content, created = row
    return SearchHit(chat, title, id, role, created, snippet(content, query.terms))


def snippet(text: str, terms: Sequence[str]) -> Snippet:
    """The part of `text` around its first hit, with all hits in it marked; its beginning where the
    hits cannot be placed.

    Args:
        terms: As `Query.terms`.
    """
    places = _places(text, terms)
    first = places[0][0] if places else 0
    start = max(0, first - SNIPPET_CHARACTERS // 3)
    if start:
        # Not in the middle of a word, unless the word is a long one.
        space = text.find(" ", start, first)
        start = space + 1 if space >= 0 else start
    end = min(len(text), start + SNIPPET_CHARACTERS)
    if places:
        end = max(end, min(places[0][1], start + 3 * SNIPPET_CHARACTERS))
    # One character for one, so that the places stay.
    shown = re.sub(r"\s", " ", text[start:end])
    before, after = "…" if start else "", "…" if end < len(text) else ""
    shift = len(before) - start
    marks = tuple((a + shift, b + shift) for a, b in places if start <= a and b <= end)
    return Snippet(f"{before}{shown}{after}", marks)


def _places(text: str, terms: Sequence[str]) -> list[tuple[int, int]]:
    """Where the terms are in `text`, in order and without overlaps."""
    plain, origin = _folded_with_origin(text)
    places: list[tuple[int, int]] = []
    for term in terms:
        # Spaces in terms stand for any white space, and for none between characters set apart.
        pattern = r"\s*".join(map(re.escape, term.split()))
        found = [(match.start(), match.end()) for match in re.finditer(pattern, plain)]
        begins = [place for place in found if not place[0] or not plain[place[0] - 1].isalnum()]
        places += begins or found
    merged: list[tuple[int, int]] = []
    for start, end in sorted((origin[a], origin[b - 1] + 1) for a, b in places if b > a):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _folded_with_origin(text: str) -> tuple[str, Sequence[int]]:
    """`text` folded, and of each of its characters which one of `text` it comes from."""
    plain = folded(text)
    if text.isascii() and len(plain) == len(text):
        return plain, range(len(text))
    pieces, origin = [], []
    for index, character in enumerate(text[:_MAX_SLOW_CHARACTERS]):
        piece = folded(character)
        pieces.append(piece)
        origin += [index] * len(piece)
    return "".join(pieces), origin
