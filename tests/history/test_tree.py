"""The tree of a chat against a model of it in plain Python, under random operations."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from app.errors import GryphonError
from app.history.records import Deleted
from app.history.store import History

from ..rounds import rounds


@dataclass
class Node:
    """A message as the model knows it."""

    id: int
    parent: int | None
    text: str
    chosen: int
    """When it was chosen last."""


@dataclass
class Model:
    """A chat: of siblings the one chosen last is shown."""

    nodes: dict[int, Node] = field(default_factory=dict)
    clock: int = 0

    def children(self, parent: int | None) -> list[Node]:
        return [node for node in self.nodes.values() if node.parent == parent]

    def path(self) -> list[int]:
        path: list[int] = []
        while below := self.children(path[-1] if path else None):
            path.append(max(below, key=lambda node: node.chosen).id)
        return path

    def choose(self, id: int | None) -> None:
        """Show what leads to it, too."""
        while id is not None:
            self.clock += 1
            self.nodes[id].chosen = self.clock
            id = self.nodes[id].parent

    def add(self, id: int, parent: int | None, text: str) -> None:
        self.nodes[id] = Node(id, parent, text, 0)
        self.choose(id)

    def below(self, id: int) -> list[int]:
        found = [id]
        for one in found:
            found += [node.id for node in self.children(one)]
        return found


def check(history: History, chat: int, model: Model) -> None:
    """Everything that can be asked of the tree is as the model says."""
    path = model.path()
    shown = history.path_to_leaf(chat)
    assert [m.id for m in shown] == path
    assert [m.content for m in shown] == [model.nodes[id].text for id in path]
    assert [m.depth for m in shown] == list(range(1, len(path) + 1))
    found = history.conversation(chat)
    assert (found.messages, found.turns) == (len(model.nodes), len(path))
    assert found.active == (path[-1] if path else None)
    assert {m.id: m.parent for m in history.tree(chat)} == {
        node.id: node.parent for node in model.nodes.values()
    }
    paged: list[int] = []
    above = None
    while True:
        page = history.page(chat, 3, above=above)
        paged = [turn.message.id for turn in page.turns] + paged
        for turn in page.turns:
            ids = sorted(node.id for node in model.children(turn.message.parent))
            assert (turn.number, turn.of) == (ids.index(turn.message.id) + 1, len(ids))
            assert [turn.before, turn.message.id, turn.after] == [
                ids[turn.number - 2] if turn.number > 1 else None,
                ids[turn.number - 1],
                ids[turn.number] if turn.number < len(ids) else None,
            ]
        if not page.earlier:
            break
        assert page.earlier == len(path) - len(paged)
        above = paged[0]
    assert paged == path


@pytest.mark.parametrize("seed", rounds(6))
def test_random_operations_do_to_the_file_what_they_do_to_the_model(
    path: Path, seed: int, record_property: pytest.RecordProperty
) -> None:
    draw = random.Random(seed)
    history = History(path)
    chat = history.create_conversation().id
    other = history.create_conversation().id
    history.append(other, None, "user", "not to be touched")
    untouched = history.path_to_leaf(other)
    model = Model()
    undone: list[tuple[Deleted, Model]] = []
    steps = 60
    for step in range(steps):
        ids = list(model.nodes)
        action = draw.choice(["say", "say", "say", "branch", "choose", "delete", "undo", "reopen"])
        text = f"text {step}"
        if action == "say" or not ids:
            leaf = (model.path() or [None])[-1]
            added = history.append(chat, leaf, draw.choice(["user", "assistant"]), text)
            model.add(added.id, leaf, text)
            undone.clear()
        elif action == "branch":
            old = draw.choice(ids)
            added = history.edit(old, text)
            model.add(added.id, model.nodes[old].parent, text)
            undone.clear()
        elif action == "choose":
            chosen = draw.choice(ids)
            leaf = history.choose(chosen)
            model.choose(chosen)
            assert leaf.id == model.path()[-1]
            undone.clear()
        elif action == "delete":
            doomed = draw.choice(ids)
            before = Model(dict(model.nodes), model.clock)
            deleted = history.delete_message(doomed)
            gone = model.below(doomed)
            assert deleted.messages == len(gone)
            for id in gone:
                del model.nodes[id]
            undone.append((deleted, before))
        elif action == "undo" and undone:
            deleted, model = undone.pop()
            history.restore(deleted)
        elif action == "reopen":
            history.close()
            history = History(path)
            assert history.claim(chat)
        check(history, chat, model)
    assert history.path_to_leaf(other) == untouched
    gone = history.delete_conversation(chat)
    assert [c.id for c in history.conversations()] == [other]
    history.restore(gone)
    check(history, chat, model)
    history.close()
    record_property("operations", steps)


def test_a_deletion_cannot_be_undone_where_its_place_is_gone(history: History) -> None:
    chat = history.create_conversation().id
    first = history.append(chat, None, "user", "first")
    second = history.append(chat, first.id, "assistant", "second")
    inner = history.delete_message(second.id)
    outer = history.delete_message(first.id)
    with pytest.raises(GryphonError) as caught:
        history.restore(inner)
    assert caught.value.code == "cannot_undo"
    history.restore(outer)
    history.restore(inner)
    with pytest.raises(GryphonError, match="cannot be undone"):
        history.restore(inner)
    assert [m.content for m in history.path_to_leaf(chat)] == ["first", "second"]
    assert history.conversation(chat).title == "first"
    whole = history.delete_conversation(chat)
    history.restore(whole)
    assert history.prompts(chat) == ["first"]
    assert [m.content for m in history.path_to_leaf(chat)] == ["first", "second"]


def test_messages_of_other_chats_are_no_parents(history: History) -> None:
    one, two = history.create_conversation().id, history.create_conversation().id
    message = history.append(one, None, "user", "mine")
    for parent in (message.id, 999):
        with pytest.raises(GryphonError) as caught:
            history.append(two, parent, "assistant", "yours")
        assert caught.value.code == "no_such_message"
    assert history.tree(two) == []


def test_a_chat_deeper_than_sqlite_recurses_is_opened_searched_and_deleted(
    history: History,
) -> None:
    chat = history.create_conversation().id
    with history.database.transaction() as db:  # as appending does, without 3000 transactions
        db.executemany(
            "INSERT INTO message (id, conversation, parent, depth, shown, role, content, state, "
            "created) VALUES (?, ?, ?, ?, 1, 'user', 'x', 'complete', 0)",
            [(n, chat, n - 1 or None, n) for n in range(1, 3001)],
        )
        db.execute("UPDATE conversation SET active = 3000 WHERE id = ?", (chat,))
    page = history.page(chat, 30)
    assert [turn.message.id for turn in page.turns] == list(range(2971, 3001))
    assert page.earlier == 2970
    assert history.choose(1).id == 3000
    undo = history.delete_message(2)
    assert undo.messages == 2999
    history.restore(undo)
    history.delete_conversation(chat)
    assert history.conversations() == []


def test_an_answer_that_was_cut_goes_on_where_it_stopped(history: History) -> None:
    chat = history.create_conversation().id
    asked = history.append(chat, None, "user", "Count.")
    cut = history.append(chat, asked.id, "assistant", "", state="streaming")
    history.finish(cut.id, "one two", "cancelled", finish_reason="cancelled")
    retry = history.append(chat, asked.id, "assistant", "", state="streaming")
    done = history.finish(retry.id, "1 2 3", "complete", finish_reason="stop")
    with pytest.raises(GryphonError) as caught:
        history.continue_answer(done.id)
    assert caught.value.code == "not_continuable"
    assert history.message(cut.id).is_cut and not done.is_cut
    going_on = history.continue_answer(cut.id)
    assert (going_on.content, going_on.state, going_on.finish_reason) == (
        "one two",
        "streaming",
        None,
    )
    assert history.path_to_leaf(chat) == [asked, going_on], "and it is shown"
