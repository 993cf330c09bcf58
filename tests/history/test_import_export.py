"""What is exported comes back whole; what others wrote comes in whole, or not at all."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest

from app.engine.protocol import Sampling, ToolCallPart
from app.errors import GryphonError
from app.history.export import as_json, as_markdown
from app.history.importing import import_chats
from app.history.records import AnswerStats, Attachment, Parameters
from app.history.search import search
from app.history.store import History


def rich_chat(history: History) -> int:
    """A chat with something of everything."""
    chat = history.create_conversation(folder="work", model="tiny").id
    history.set_system_prompt(chat, "Be brief.")
    history.set_parameters(
        chat, Parameters(sampling=Sampling(seed=3, logit_bias={1: 2.0}), stop=["x"])
    )
    history.pin(chat)
    notes = Attachment("notes.md", "```\ncode\n```\n")
    asked = history.append(chat, None, "user", "What is séa salt?", attachments=[notes])
    answer = history.append(chat, asked.id, "assistant", "", model="tiny", state="streaming")
    history.finish(
        answer.id,
        "Salt.",
        "complete",
        reasoning="Hmm 漢字",
        tool_calls=[ToolCallPart("c1", "look", '{"a": 1}')],
        finish_reason="tool_calls",
        stats=AnswerStats(1, 2, 3, 4.0, 5.0, 6.0, 7),
    )
    history.append(chat, answer.id, "tool", "found it", tool_call_id="c1")
    retry = history.append(chat, asked.id, "assistant", "", model="tiny", state="streaming")
    history.finish(retry.id, "", "failed", error="The engine stopped.")
    draw = random.Random(1)
    for number in range(20):
        parent = draw.choice(history.tree(chat))
        history.append(chat, parent.id, draw.choice(["user", "assistant"]), f"turn {number}")
    history.choose(answer.id)
    history.rename(chat, "Salt")
    history.save_draft(chat, "unsent", [Attachment("draft.txt", "draft text")])
    history.remember_prompt(chat, "/help")
    return chat


def test_what_is_exported_and_imported_is_the_same(history: History, tmp_path: Path) -> None:
    chats = [rich_chat(history), history.create_conversation().id, rich_chat(history)]
    file = tmp_path / "chats.json"
    file.write_text("".join(as_json(history, chats)))
    document = json.loads(file.read_text())
    elsewhere = History(tmp_path / "elsewhere.sqlite3")
    elsewhere.create_conversation()
    result = import_chats(elsewhere, file)
    assert (len(result.conversations), result.already_here, result.left_out) == (3, 0, 0)
    for old, new in zip(chats, result.conversations, strict=True):
        path = [m.content for m in history.path_to_leaf(old)]
        assert [m.content for m in elsewhere.path_to_leaf(new)] == path
        # Every branch leads on as it did.
        for before, after in zip(history.tree(old), elsewhere.tree(new), strict=True):
            assert history.choose(before.id).content == elsewhere.choose(after.id).content
            assert before.attachments == after.attachments and before.stats == after.stats

    again = json.loads("".join(as_json(elsewhere, result.conversations)))
    for one in (document, again):
        for chat in one["chats"]:
            numbers = {m["id"]: n for n, m in enumerate(chat["messages"])}
            del chat["active"]  # chosen above
            for message in chat["messages"]:
                del message["shown"]
                message["id"] = numbers[message["id"]]
                message["parent"] = numbers.get(message["parent"])
    assert again["chats"] == document["chats"]
    assert import_chats(elsewhere, file).already_here == 3
    assert import_chats(history, file).already_here == 3
    assert len(search(elsewhere, "sea salt")) == 2
    elsewhere.close()


def test_markdown_shows_the_path_with_fences_that_hold(history: History) -> None:
    text = as_markdown(history, rich_chat(history))
    assert text.startswith("# Salt\n\n*")
    for part in (
        "## System\n\nBe brief.",
        "## You\n\nWhat is séa salt?",
        "Attached `notes.md`:\n\n````\n```\ncode\n```\n````",
        "<details><summary>Thinking</summary>\n\nHmm 漢字\n\n</details>\n\nSalt.",
        'Called `look`:\n\n```json\n{"a": 1}\n```',
    ):
        assert part in text
    assert "The engine stopped." not in text, "another branch"
    assert text.endswith("\n") and not text.endswith("\n\n")


def node(id: str, parent: str | None, role: str = "user", text: Any = "x", **more: Any) -> Any:
    content = text if isinstance(text, dict) else {"content_type": "text", "parts": [text]}
    message = {"author": {"role": role}, "content": content, "create_time": 1.7e9} | more
    return {"id": id, "parent": parent, "children": [], "message": message}


def chatgpt(*nodes: Any, **more: Any) -> Any:
    mapping = {one["id"]: one for one in nodes}
    return {"title": "Salt", "create_time": 1.7e9, "update_time": 1.8e9, "mapping": mapping} | more


TREE = chatgpt(
    {"id": "root", "parent": None, "children": ["sys"], "message": None},
    node("sys", "root", "system", "", metadata={"is_visually_hidden_from_conversation": True}),
    node("q", "sys", text="What is salt?"),
    node("a1", "q", "assistant", "Sodium chloride.", metadata={"model_slug": "gpt-4o"}),
    node(
        "think",
        "q",
        "assistant",
        {"content_type": "thoughts", "thoughts": [{"summary": "s", "content": "Let me see."}]},
    ),
    node("call", "think", "assistant", {"content_type": "code", "text": "go()"}, recipient="web"),
    node("result", "call", "tool", {"content_type": "execution_output", "text": "NaCl"}),
    node("a2", "result", "assistant", "NaCl.", recipient="all", weight=1.0),
    node(
        "q2",
        "a1",
        "user",
        {
            "content_type": "multimodal_text",
            "parts": [{"content_type": "image_asset_pointer"}, "?"],
        },
    ),
    current_node="a1",
    conversation_id="c-1",
)  # fmt: skip


@pytest.mark.parametrize("form", ["json", "zip", "single"])
def test_a_chatgpt_export_comes_in_as_a_person_saw_it(
    history: History, tmp_path: Path, form: str
) -> None:
    file = tmp_path / "conversations.json"
    file.write_text(json.dumps(TREE if form == "single" else [TREE, chatgpt(id="empty")]))
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
            archive.write(file, "conversations.json")
            archive.writestr("user.json", "{}")
        file = tmp_path / "export.zip"
    result = import_chats(history, file)
    assert (len(result.conversations), result.left_out) == (1 if form == "single" else 2, 1)
    chat = history.conversation(result.conversations[0])
    assert (chat.title, chat.titled_by, chat.created, chat.updated) == (
        "Salt",
        "model",
        1.7e9,
        1.8e9,
    )
    asked, first, again = history.path_to_leaf(chat.id)
    assert (asked.content, first.content, first.model) == (
        "What is salt?",
        "Sodium chloride.",
        "gpt-4o",
    )
    assert again.content == "[image_asset_pointer not imported]\n\n?"
    other = history.choose(history.siblings(first.id)[1])
    assert (other.content, other.reasoning, other.role) == ("NaCl.", "Let me see.", "assistant")
    assert chat.messages == 4
    assert import_chats(history, file).conversations == []


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url"}]},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hm.",
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "c", "content": "seen"},
    {"role": "assistant", "content": "Hello \ud83d"},
]
OLLAMA = {
    "model": "llama3.2",
    "messages": [
        {"role": "user", "content": "Hi", "images": ["aGk="]},
        {
            "role": "assistant",
            "content": "",
            "thinking": "Hm.",
            "tool_calls": [{"function": {"name": "look", "arguments": {"at": "it"}}}],
        },
        {"role": "tool", "tool_name": "look", "content": "seen"},
        {"role": "assistant", "content": "Hello"},
    ],
}


@pytest.mark.parametrize("value", [MESSAGES, {"messages": MESSAGES}, [{"messages": MESSAGES}]])
def test_openai_messages_come_in(history: History, tmp_path: Path, value: Any) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps(value))
    (chat,) = import_chats(history, file).conversations
    assert history.conversation(chat).system_prompt == "Be brief."
    asked, called, seen, answer = history.path_to_leaf(chat)
    assert asked.content == "Hi\n\n[image_url not imported]"
    assert called.tool_calls == (ToolCallPart("c", "look", "{}"),) and called.reasoning == "Hm."
    assert (seen.role, seen.tool_call_id) == ("tool", "c")
    assert answer.content == "Hello \ufffd"
    assert history.prompts(chat) == [asked.content]
    assert import_chats(history, file).already_here == 1


def test_ollama_messages_come_in(history: History, tmp_path: Path) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps(OLLAMA))
    result = import_chats(history, file)
    assert result.left_out == 1
    asked, called, _, answer = history.path_to_leaf(result.conversations[0])
    assert asked.content == "Hi\n\n[image not imported]"
    assert called.tool_calls[0].arguments == '{"at": "it"}' and called.reasoning == "Hm."
    assert (answer.content, answer.model) == ("Hello", "llama3.2")


def own(*messages: Any, **more: Any) -> Any:
    fine = [m if isinstance(m, dict) else {} for m in messages]
    return {
        "format": "gryphon-chats",
        "version": 1,
        "chats": [{"uid": "u", "messages": fine, "attachments": {}} | more],
    }


def said(id: Any, parent: Any = None, **more: Any) -> Any:
    return {
        "id": id, "parent": parent, "shown": 1, "role": "user", "content": "x", "created": 1.0
    } | more  # fmt: skip


DEEP: Any = "x"
for _ in range(500):
    DEEP = [DEEP]

REFUSED = {
    "a circle": (
        [chatgpt(node("a", "b"), node("b", "a"))],
        "f.json[0].mapping.a.parent must be the id of a message above it",
    ),
    "a circle below": (
        [chatgpt(node("r", None), node("a", "c"), node("b", "a"), node("c", "b"))],
        "f.json[0].mapping.a.parent",
    ),
    "its own parent": ([chatgpt(node("a", "a"))], "f.json[0].mapping.a.parent"),
    "a missing parent": (
        [chatgpt(node("a", "gone-1"))],
        "f.json[0].mapping.a.parent must be the id of another message, got 'gone-1'",
    ),
    "the second chat": ([TREE, chatgpt(node("a", 7))], "f.json[1].mapping.a.parent must be text"),
    "no node": ([chatgpt({"id": "a"} | {"message": 3})], "f.json[0].mapping.a.message"),
    "mapping": ([{"mapping": [1]}], "f.json[0].mapping must be an object, got an array"),
    "parts": (
        [chatgpt(node("a", None, text={"content_type": "text", "parts": "abc"}))],
        "f.json[0].mapping.a.message.content.parts must be an array",
    ),
    "a time": ([chatgpt(node("a", None, create_time="now"))], "create_time must be a number"),
    "a huge time": ([chatgpt(create_time=1e300)], "f.json[0].create_time must be 0 to 1e+11"),
    "a role": ([chatgpt(node("a", None, "robot"))], "author.role must be system, "),
    "a current node": ([chatgpt(node("a", None), current_node="b")], "current_node must be the id"),
    "a chat in a chat": ([[TREE]], "f.json[0] must be a chat"),
    "a number": (7, "f.json must be an array, got 7"),
    "nothing": ([], "f.json must be a list of chats or of messages that is not empty"),
    "other json": ({"a": 1}, 'f.json must be a chat (with "mapping"'),
    "a format": ({"format": "x"}, "f.json.format must be gryphon-chats, got 'x'"),
    "a version": ({"format": "gryphon-chats", "version": 2}, "f.json.version must be 1: update"),
    "no role": ([{"role": "user", "content": "x"}, {"content": "y"}], "f.json[1].role must be"),
    "only a system": ([{"role": "system", "content": "x"}], "at least one message by the user"),
    "a content": ([{"role": "user", "content": {"a": 1}}], "f.json[0].content must be text"),
    "own circle": (own(said(1, 2), said(2, 1)), "f.json.chats[0].messages[0].parent"),
    "own parent": (own(said(1, 9)), "f.json.chats[0].messages[0].parent must be the id of another"),
    "own twice": (own(said(1), said(1)), "f.json.chats[0].messages[1].id must be a number that no"),
    "own huge": (own(said(1, shown=2**63)), "f.json.chats[0].messages[0].shown must be 0 to"),
    "own flag": (own(said(True)), "f.json.chats[0].messages[0].id must be a whole number"),
    "own state": (own(said(1, state="x")), "f.json.chats[0].messages[0].state must be streaming, "),
    "own stats": (own(said(1, stats={"decode_s": "x"})), "messages[0].stats must be the figures"),
    "own active": (own(said(1), active=2), "f.json.chats[0].active must be the id of a message"),
    "own uid": (own(uid="u" * 200), "f.json.chats[0].uid must be 1 to 150 characters"),
    "own digest": (
        own(attachments={"abc": "text"}),
        "f.json.chats[0].attachments.abc must be the text with the SHA-256 abc",
    ),
    "own attachment": (
        own(said(1, attachments=[{"name": "n", "digest": "d"}])),
        "messages[0].attachments[0].digest must be the digest of one",
    ),
    "own sampling": (
        own(parameters={"sampling": {"temperature": 9}}),
        "f.json.chats[0].parameters must be sound parameters (temperature must be 0 to 2",
    ),
    "own surrogate": (own(parameters={"stop": ["\ud800"]}), "f.json.chats[0].parameters must be"),
    "deep": (
        [{"role": "user", "content": DEEP}],
        "f.json[0].content[0] must be text, got an array",
    ),
}


@pytest.mark.parametrize(("value", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_refused_with_its_place_and_nothing_is_imported(
    history: History, tmp_path: Path, value: Any, sentence: str
) -> None:
    if isinstance(value, list) and value and "mapping" in value[0]:
        value = [chatgpt(node("fine", None), id="fine"), *value]
        sentence = sentence.replace("f.json[1]", "f.json[2]").replace("f.json[0]", "f.json[1]")
    file = tmp_path / "f.json"
    file.write_text(json.dumps(value))
    with pytest.raises(GryphonError) as caught:
        import_chats(history, file)
    assert caught.value.code == "invalid_import"
    assert sentence in caught.value.message
    assert caught.value.message.endswith("Nothing was imported.")
    assert history.conversations() == [] and history.folders() == []


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"not json", "f.json is not JSON"),
        (b"\xff\xfe\x00", "f.json is not JSON"),
        (b"", "f.json is not JSON"),
        (b'[{"role": "user", "content": NaN}]', "NaN is no JSON"),
        (b"[" * 100_000, "f.json is nested too deeply"),
        (b"[" + b"9" * 10_000 + b"]", "f.json is not JSON"),
        (None, "cannot be read: No such file"),
    ],
    ids=["text", "bytes", "empty", "nan", "deep", "digits", "missing"],
)
def test_what_is_no_json_is_refused(
    history: History, tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    file = tmp_path / "f.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(GryphonError) as caught:
        import_chats(history, file)
    assert caught.value.code == "import_unreadable" and sentence in caught.value.message
    assert history.conversations() == []


def test_a_file_that_is_too_large_is_refused(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.history.importing.MAX_IMPORT_BYTES", 1_000_000)
    file = tmp_path / "f.json"
    file.write_text(json.dumps(MESSAGES) + " " * 1_000_000)
    bomb = tmp_path / "f.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, "conversations.json")
    assert bomb.stat().st_size < 10_000
    for one in (file, bomb):
        with pytest.raises(GryphonError, match="Split it"):
            import_chats(history, one)
    with zipfile.ZipFile(bomb, "w") as archive:
        archive.writestr("other.json", "[]")
    with pytest.raises(GryphonError, match="an archive without a conversations.json"):
        import_chats(history, bomb)


def test_a_disk_that_fills_up_leaves_nothing_half_imported(
    history: History, tmp_path: Path
) -> None:
    file = tmp_path / "f.json"
    many = [chatgpt(node("a", None, text="words " * 2000), id=f"c{n}") for n in range(30)]
    file.write_text(json.dumps(many))
    db = history.database.connection
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages + 40}")
    with pytest.raises(GryphonError) as caught:
        import_chats(history, file)
    assert caught.value.code == "history_disk_full"
    assert history.conversations() == []
    db.execute("PRAGMA max_page_count = 1000000")
    assert len(import_chats(history, file).conversations) == 30


def test_a_chat_of_many_turns_comes_in(history: History, tmp_path: Path) -> None:
    nodes = [node(f"n{n}", f"n{n - 1}" if n else None, text=f"t{n}") for n in range(5000)]
    random.Random(0).shuffle(nodes)
    file = tmp_path / "f.json"
    file.write_text(json.dumps([chatgpt(*nodes)]))
    (chat,) = import_chats(history, file).conversations
    assert [m.content for m in history.path_to_leaf(chat)] == [f"t{n}" for n in range(5000)]
