"""Entries of the prefix cache on disk, for one model: saved, and restored when a prompt begins so.

What is on disk is known by the headers of its files, read when the model is loaded; states are read
when a prompt goes on from them. As in memory, what can be trimmed is kept once: a file leaves out
the layers that a longer file of its branch holds, and gets them from whichever does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from app.engine.fingerprint import fingerprint
from app.engine.prefix_cache import Entry
from app.engine.prefix_files import MAX_FILES, PrefixFiles
from app.engine.resident import ResidentModel
from app.engine.state_leaves import (
    arrays_in,
    is_trimmable,
    layout_of,
    leaves_of,
    states_of,
    tokens_read,
    trimmed,
)
from app.engine.states_file import StatesFile, file_name, read_description
from app.engine.token_tree import Node, TokenTree
from mlxmodels.saved_state import load_states, save_states

logger = logging.getLogger(__name__)

# A file that saves less than a token per so many bytes is not worth reading, and one larger than
# that takes longer than a chunk of prefill.
_BYTES_PER_TOKEN = 1024**2
_URGENT_BYTES = 64 * 1024**2


class Spill:
    """The files of one model.

    Args:
        like: States as the model makes them.
        layouts: Of their leaves after any token.
    """

    def __init__(
        self, files: PrefixFiles, key: str, like: Sequence[Any], layouts: Sequence[Any]
    ) -> None:
        self._files = files
        self._key = key
        self._like = like
        self._layouts = layouts
        self._tree = TokenTree[StatesFile]()
        self._nodes: dict[Path, Node[StatesFile]] = {}
        self._can_write = True
        for stored in files.stored(key)[-MAX_FILES:]:
            try:
                tokens, file = read_description(stored.path, key, len(self._layouts))
                file.chats = files.chats(stored.path)
                self._add(tokens, file)
            except Exception as error:  # whatever a file can make them raise
                self._refuse(stored.path, error)
        for path, node in list(self._nodes.items()):
            if self._sources(node) is None:  # what it lacks is gone
                self._drop(path)

    @classmethod
    def open(cls, files: PrefixFiles, resident: ResidentModel) -> Spill | None:
        """The files of a model that was just loaded; None where nothing can be kept on disk."""
        try:
            files.clean()
            if not files.is_on:
                return None
            key = fingerprint(resident)
            if key is None:
                return None
            states = resident.loaded.make_cache()
            # Never evaluated: what the states look like is known without.
            resident.loaded.model(mx.array([[0]], mx.int32), cache=states)
            layouts = [layout_of(leaf) for leaf in leaves_of(states)]
            return cls(files, key, resident.loaded.make_cache(), layouts)
        except Exception:
            logger.exception("what was read before cannot be kept on disk")
            return None

    def restore(
        self, tokens: Sequence[int], *, beyond: int, is_urgent: bool
    ) -> tuple[list[int], Entry, int] | None:
        """The longest prefix of a prompt on disk, if it is longer than `beyond`.

        Returns:
            The tokens that the states have read; the states, with the chats that go on from them;
            and how many of the tokens are the prompt's.
        """

        def serves(node: Node[StatesFile], length: int) -> bool:
            file = _file(node)
            if length <= beyond or not (node.depth == length or self._all_trimmable(file)):
                return False
            sources = self._sources(node)
            if sources is None:
                return False
            nbytes = sum(_file(source).nbytes for source in {node, *sources.values()})
            worth = (length - beyond) * _BYTES_PER_TOKEN
            return nbytes <= (min(worth, _URGENT_BYTES) if is_urgent else worth)

        while (found := self._tree.longest(tokens, serves)) is not None:
            length, node = found
            states = self._load(node)
            if states is not None:
                entry = Entry(states, chats=dict(_file(node).chats))
                return node.sequence, entry, length
        return None

    def save(self, node: Node[Entry]) -> None:
        """Write what the disk does not have of an entry; a failure costs time later, no answer."""
        if not self._can_write:
            return
        try:
            self._save(node)
        except FileNotFoundError:
            pass  # somebody purges what is there
        except OSError as error:
            self._can_write = False
            logger.warning("nothing more is kept on disk: %s", error.strerror or error)
        except Exception:
            logger.exception("saving states failed")

    def forget(self, chat: str) -> None:
        """Remove the words of a chat, of this model and of others; all words if it is "".

        Raises:
            OSError: a file cannot be removed.
        """
        for path, chats in self._files.forget(chat).items():
            if path in self._nodes:
                if chats is None:
                    self._drop(path, also_file=False)
                else:
                    _file(self._nodes[path]).chats = chats

    # Writing.

    def _save(self, node: Node[Entry]) -> None:
        assert node.entry is not None
        tokens, chats = node.sequence, node.entry.chats
        leaves = leaves_of(node.entry.states)
        trimmable = frozenset(i for i, leaf in enumerate(leaves) if is_trimmable(leaf))
        longer = self._longer(tokens)
        lacks = trimmable & {i for file in longer for i in file.trimmable - file.lacks}
        path = self._files.directory(self._key) / file_name(tokens)
        known = self._nodes.get(path)
        if known is not None and lacks == _file(known).lacks and path.exists():
            self._share(_file(known), chats)
            self._files.touch(path)
            return
        for file in longer:
            if len(lacks) == len(leaves) and self._all_trimmable(file):
                self._share(file, chats)
                self._files.touch(file.path)
                return
        kept = [leaf for i, leaf in enumerate(leaves) if i not in lacks]
        nbytes = sum(one.nbytes for one in arrays_in([leaf.state for leaf in kept]))
        removed = self._files.make_room(nbytes + 16 * len(tokens) + 4096)
        if removed is None:
            return
        if gone := [other for other in removed if other in self._nodes]:
            for other in gone:
                self._drop(other, also_file=False)
            self._save(node)  # what it lacks may have been there
            return
        redundant = [] if known is None else [_file(known)]
        if len(trimmable) == len(leaves):
            above = [_file(shorter) for shorter in self._above(tokens)]
            redundant += [shorter for shorter in above if self._all_trimmable(shorter)]
        joined = _joined(chats, *(one.chats for one in redundant))
        file = StatesFile(path, 0, lacks, trimmable, joined)
        self._files.set_chats(path, file.chats)  # first: states of nobody could not be purged
        save_states(path, kept, file.metadata(self._key, tokens))
        file.nbytes = path.stat().st_size
        self._drop(path, also_file=False)
        self._add(tokens, file)
        for one in redundant:
            if one.path != path:
                self._drop(one.path)

    def _share(self, file: StatesFile, chats: dict[str, int]) -> None:
        """More chats go on from states that are on disk."""
        joined = _joined(file.chats, chats)
        if joined != file.chats:
            self._files.set_chats(file.path, joined)
            file.chats = joined

    # Reading.

    def _load(self, node: Node[StatesFile]) -> list[Any] | None:
        """States after the tokens of a node; None, and its file or that of a source is gone."""
        sources = self._sources(node)
        assert sources is not None
        leaves: dict[int, Any] = {}
        for source in {node, *sources.values()}:
            file = _file(source)
            wanted = {i for i, of in sources.items() if of is source}
            if source is node:
                wanted = set(range(len(self._layouts))) - file.lacks
            try:
                held = self._read(source)
                for i in wanted:
                    (leaves[i],) = trimmed([held[i]], source.depth - node.depth)
            except Exception as error:  # whatever a file can make them raise
                self._refuse(file.path, error)
                return None
            self._files.touch(file.path)
        return states_of([leaves[i] for i in range(len(self._layouts))], self._like)

    def _read(self, node: Node[StatesFile]) -> dict[int, Any]:
        """The leaves that a file holds.

        Raises:
            ModelError, ValueError, OSError: they are damaged, or not what the model's look like.
        """
        file = _file(node)
        tokens, now = read_description(file.path, self._key, len(self._layouts))
        if (now.lacks, now.trimmable) != (file.lacks, file.trimmable) or tokens != node.sequence:
            raise ValueError("it has changed")
        states, _ = load_states(file.path)
        held = [i for i in range(len(self._layouts)) if i not in file.lacks]
        for i, state in zip(held, states, strict=True):
            if layout_of(state) != self._layouts[i] or tokens_read(state) not in (None, node.depth):
                raise ValueError(f"its layer state {i} is not of this model after those tokens")
            if i in file.trimmable and not is_trimmable(state):
                raise ValueError(f"its layer state {i} cannot be trimmed")
        return dict(zip(held, states, strict=True))

    # The index.

    def _add(self, tokens: Sequence[int], file: StatesFile) -> None:
        node = self._tree.node(tokens)
        node.entry = file
        self._nodes[file.path] = node

    def _drop(self, path: Path, *, also_file: bool = True) -> None:
        node = self._nodes.pop(path, None)
        if node is not None:
            self._tree.remove(node)
        if also_file:
            try:
                self._files.remove(path)
            except OSError as error:
                logger.warning("cannot remove %s: %s", path, error.strerror or error)

    def _refuse(self, path: Path, error: Exception) -> None:
        logger.warning("removing %s, which cannot be used: %s", path, error)
        self._drop(path)

    def _sources(self, node: Node[StatesFile]) -> dict[int, Node[StatesFile]] | None:
        """For each leaf that a file lacks, the one that has it; None if none has."""
        sources: dict[int, Node[StatesFile]] = {}
        missing = set(_file(node).lacks)
        if missing:
            for longer in node.subtree():
                file = _file(longer)
                for i in missing & (file.trimmable - file.lacks) if longer is not node else ():
                    sources[i] = longer
                missing -= sources.keys()
        return None if missing else sources

    def _longer(self, tokens: Sequence[int]) -> list[StatesFile]:
        """The files whose tokens begin with these and go on."""
        node, shared = self._tree.descend(tokens)
        if shared < len(tokens):
            return []
        return [_file(longer) for longer in node.subtree() if longer.depth > len(tokens)]

    def _above(self, tokens: Sequence[int]) -> list[Node[StatesFile]]:
        """The files with whose tokens these begin, and go on."""
        node, shared = self._tree.descend(tokens)
        nodes = [node] if node.entry is not None else []
        return [one for one in [*nodes, *node.ancestors()] if one.depth <= shared < len(tokens)]

    def _all_trimmable(self, file: StatesFile) -> bool:
        return len(file.trimmable) == len(self._layouts)


def _file(node: Node[StatesFile]) -> StatesFile:
    assert node.entry is not None
    return node.entry


def _joined(*several: dict[str, int]) -> dict[str, int]:
    """Every chat with the most tokens it goes on from."""
    joined: dict[str, int] = {}
    for chats in several:
        for chat, length in chats.items():
            joined[chat] = max(length, joined.get(chat, 0))
    return joined
