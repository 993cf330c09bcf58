"""What a person types is found, in any script, and never an error."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.history.records import SearchHit
from app.history.search import search, snippet
from app.history.store import History
from app.history.words import Query, prepared

TEXTS = {
    "english": "The quick brown fox jumps over the lazy dog.\nA paragraph about getUserName().",
    "french": "Où est l'ÉCOLE ? Ça coûte 5 € — naïve façade",
    "decomposed": "cafe\u0301 au lait",
    "german": "Die Krankenversicherung in der Straße",
    "chinese": "我爱北京天安门,数据库很好用。",
    "japanese": "データベースが好きです。",
    "korean": "데이터베이스를 좋아합니다",
    "arabic": "قَوَاعِدُ البَيَانَاتِ مفيدة جداً",
    "persian": "می\u200cخواهم کتاب بخوانم",
    "hebrew": "שָׁלוֹם עולם",
    "hindi": "हिन्दी में डेटाबेस",
    "thai": "ฉันชอบฐานข้อมูลมาก",
    "emoji": "Great🎉🎉 job 👩‍💻, flag 🇩🇪 and ❤️",
    "code": 'if (a->b != NULL) { x += "C++"; } // C# too, see /etc/passwd and foo.bar_baz',
    "wide": "Full-width: ABC123 ﬁne",
}


@pytest.fixture
def ids(history: History) -> dict[str, int]:
    """A chat with a message of each text; of each, its id."""
    chat = history.create_conversation()
    history.append(chat.id, None, "assistant", "")
    return {
        name: history.append(chat.id, None, "assistant", text).id for name, text in TEXTS.items()
    }


FINDS = [
    ("fox", "english"),
    ("QUICK fox", "english"),
    ("fox quick", "english"),
    ('"brown fox"', "english"),
    ("“dog. a para”", "english"),
    ("graph", "english"),
    ("username", "english"),
    ("getUserName()", "english"),
    ("ecole", "french"),
    ("École", "french"),
    ("facade NAÏVE", "french"),
    ("l'école", "french"),
    ("5 €", "french"),
    ("café", "decomposed"),
    ("CAFE", "decomposed"),
    ("versicherung", "german"),
    ("STRASSE", "german"),
    ("北京", "chinese"),
    ("数据库", "chinese"),
    ("好", "chinese"),
    ("天安门 数据", "chinese"),
    ("データ", "japanese"),
    ("ベース", "japanese"),
    ("好き", "japanese"),
    ("데이터", "korean"),
    ("베이스", "korean"),
    ("قواعد", "arabic"),
    ("البيانات", "arabic"),
    ("میخواهم", "persian"),
    ("می\u200cخواهم", "persian"),
    ("שלום", "hebrew"),
    ("हिन्दी", "hindi"),
    ("डेटाबेस", "hindi"),
    ("ข้อมูล", "thai"),
    ("🎉", "emoji"),
    ("👩‍💻", "emoji"),
    ("🇩🇪", "emoji"),
    ("❤", "emoji"),
    ("C++", "code"),
    ("c#", "code"),
    ("->", "code"),
    ("/etc/passwd", "code"),
    ("foo.bar", "code"),
    ("bar_b", "code"),
    ("abc123", "wide"),
    ("fine", "wide"),
]


@pytest.mark.parametrize(("query", "name"), FINDS)
def test_finds_and_marks_it(history: History, ids: dict[str, int], query: str, name: str) -> None:
    hits = search(history, query)
    assert ids[name] in [hit.message for hit in hits]
    (hit,) = (hit for hit in hits if hit.message == ids[name])
    marked = "".join(prepared(hit.snippet.text[a:b]) for a, b in hit.snippet.marks)
    for term in Query.parse(query).terms:
        assert term.replace(" ", "") in marked.replace(" ", "")


@pytest.mark.parametrize(
    "query",
    ["北安", "天北京", "fox cat", '"fox brown"', "b->a", "c+++", "🎉👩", "xgetUserName", ""],
)
def test_finds_nothing_that_is_not_there(history: History, ids: dict[str, int], query: str) -> None:
    assert search(history, query) == []


OPERATORS = [
    '"', '""', '"""', "'", "*", "fox*", "^fox", "AND", "OR", "NOT", "fox AND", "NEAR(a b)",
    "NEAR(a, b", "a:b", "body:fox", "body : fox", "{a b}:c", "-fox", "+fox", "(", "fox)", "%", "_",
    "\\", "\0", "a\0b", "; DROP TABLE message", "𝕗𝕠𝕩", "\ud800", "\udfff fox", "￾", "   ",
    "fox " * 1000, "x" * 100_000, '"' * 999, "́", "🇩", "٪",
]  # fmt: skip


@pytest.mark.parametrize("query", OPERATORS, ids=range(len(OPERATORS)))
def test_nothing_typed_is_an_error(history: History, ids: dict[str, int], query: str) -> None:
    search(history, query)


def test_scripts_without_spaces_are_indexed_by_character() -> None:
    assert prepared("我爱北京 really") == "我 爱 北 京 really"
    assert prepared("A🎉🎉b") == "a 🎉 🎉 b"
    assert Query.parse("北京").match == '"北 京"', "a phrase: found by the index, anywhere"


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=40))
def test_a_query_is_one_whatever_it_is(text: str) -> None:
    for term in Query.parse(text).terms:
        assert term == prepared(term), "as the index holds it"


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.sampled_from("aAéß漢字か🎉 ŉİ\n" + string.punctuation), max_size=300),
    st.lists(st.sampled_from(["a", "é", "漢", "字か", "🎉", "ss", "i"]), max_size=3),
)
def test_marks_are_within_the_snippet_and_apart(text: str, words: list[str]) -> None:
    found = snippet(text, [prepared(word) for word in words])
    assert "\n" not in found.text
    end = 0
    for start, stop in found.marks:
        assert end <= start < stop <= len(found.text)
        end = stop


def messages(hits: list[SearchHit]) -> list[int | None]:
    return [hit.message for hit in hits]


def test_titles_come_first_then_words_then_parts_of_words(history: History) -> None:
    chat = history.create_conversation().id
    inside = history.append(chat, None, "assistant", "subharbour harbourless x").id
    often = history.append(chat, None, "assistant", "harbour harbour harbour").id
    once = history.append(chat, None, "assistant", "a harbour " + "and more words " * 50).id
    part = history.append(chat, None, "assistant", "subharbour").id
    history.rename(chat, "The old harbour")
    hits = search(history, "harbour")
    assert messages(hits)[0] is None and hits[0].title == "The old harbour"
    assert messages(hits)[1] == often
    assert messages(hits)[-1] == part
    assert set(messages(hits)) == {None, inside, often, once, part}
    assert messages(search(history, "harbour", limit=1)) == [None, often]


def test_the_index_follows_every_change(history: History) -> None:
    one, two = history.create_conversation().id, history.create_conversation().id
    asked = history.append(one, None, "user", "alpha")
    answer = history.append(one, asked.id, "assistant", "", state="streaming")
    history.update_text(answer.id, "beta so far")
    assert search(history, "beta") == [], "words are indexed once they are all there"
    history.finish(answer.id, "beta and gamma", "complete")
    history.append(two, None, "user", "gamma")
    assert len(search(history, "gamma")) == 3, "two messages and a title"
    assert messages(search(history, "gamma", conversation=one)) == [answer.id]
    history.rename(two, "delta")
    assert len(search(history, "gamma")) == 2
    undo = history.delete_message(asked.id)
    assert search(history, "alpha") == [] == search(history, "beta")
    history.restore(undo)
    assert messages(search(history, "alpha")) == [None, asked.id]
    whole = history.delete_conversation(one)
    assert search(history, "beta") == []
    history.restore(whole)
    assert messages(search(history, "beta")) == [answer.id]
    assert messages(search(history, "alpha")) == [None, asked.id]


def test_a_snippet_is_short_and_around_the_hit() -> None:
    found = snippet("word " * 1000 + "needle" + " more" * 1000, ["needle"])
    assert found.text.startswith("…") and found.text.endswith("…")
    assert len(found.text) < 130
    assert [found.text[a:b] for a, b in found.marks] == ["needle"]
    assert snippet("a needle", ["needle"]).text == "a needle"
    assert snippet("nothing", ["needle"]).marks == ()
