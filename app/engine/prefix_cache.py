"""Layer states of prompts and answers that were computed already, found again by their tokens.

A prefix tree: a node is a sequence of tokens, and an entry in it the states of a model's layers
after exactly those. A prompt continues from the longest entry it begins with, so that turn two of
a chat computes what is new in it. Tokens alone decide: how a text was rendered or tokenized cannot
make a reuse wrong, only shorter.

States that can be trimmed (keys and values of every token) serve every shorter prefix as well. An
entry made of such states only makes those on the way to it redundant, and a prompt that parts from
it half-way gets a trimmed copy. A recurrence and a full window have no way back: their entries
serve exactly their own tokens. Where a model has both kinds of layer, what can be trimmed is kept
once, in the longest entry of a branch, and shorter entries look at the beginning of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from app.engine.state_leaves import arrays_in, copied, is_trimmable, leaves_of, states_of, trimmed
from app.engine.token_tree import Node, TokenTree

if TYPE_CHECKING:
    from app.engine.spill import Spill

# A bound on the work of choosing what goes, for models whose states are tiny.
MAX_ENTRIES = 512
# More chats than this that go on from one entry are not told apart: it stays while one of these is.
_MAX_CHATS = 64


@dataclass(eq=False)
class Entry:
    """States after the tokens on the way to a node.

    Attributes:
        floor: The cache's at their last use.
        chats: Which chats go on from them, and after how many of the tokens.
        is_saved: Whether the disk has them as they are, or has refused them.
    """

    states: list[Any]
    floor: float = 0.0
    chats: dict[str, int] = field(default_factory=dict)
    is_saved: bool = False

    def __post_init__(self) -> None:
        self.is_trimmable = all(is_trimmable(leaf) for leaf in leaves_of(self.states))

    def arrays(self) -> list[mx.array]:
        return list(arrays_in([state.state for state in self.states]))

    def goes_on(self, chat: str, length: int) -> None:
        """Note that a chat goes on from the first tokens."""
        known = chat in self.chats or len(self.chats) < _MAX_CHATS
        if chat and known and self.chats.get(chat, 0) < length:
            self.chats[chat] = length
            self.is_saved = False


class PrefixCache:
    """Entries up to a number of bytes; used by one thread, the one that owns MLX.

    The least valuable entry goes first. An entry's value is what it saves, the tokens that no other
    entry of its branch would serve, per byte it would free, plus the value of what went last at the
    time it was used: so what is not used sinks below what is new, the sooner the cheaper it is to
    compute again (GreedyDual-Size).

    Args:
        budget_bytes: For what is in memory.
        spill: Where entries are saved, and found again after a restart; None for nowhere.
    """

    def __init__(self, budget_bytes: int, spill: Spill | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        """Bytes of all entries; what several share counts once."""
        self._spill = spill
        self.clear()

    def clear(self) -> None:
        """Forget everything that is in memory."""
        self._tree = TokenTree[Entry]()
        self._floor = 0.0
        self._held: dict[int, tuple[mx.array, int]] = {}
        self._count = 0
        self.nbytes = 0

    def __len__(self) -> int:
        return self._count

    def longest(self, tokens: Sequence[int]) -> int:
        """How long a prefix `find` would find in memory."""
        found = self._tree.longest(tokens, _serves)
        return found[0] if found is not None else 0

    def find(
        self, tokens: Sequence[int], chat: str = "", *, is_urgent: bool = False
    ) -> tuple[int, list[Any]] | None:
        """The longest usable prefix that leaves at least the last token to be computed.

        Args:
            chat: Which chat goes on from it.
            is_urgent: Whether others wait meanwhile: large files are not read then.

        Returns:
            Its length and states of the caller's own after it, or None.
        """
        found = self._tree.longest(tokens, _serves)
        if self._spill is not None:
            length = found[0] if found is not None else 0
            restored = self._spill.restore(tokens, beyond=length, is_urgent=is_urgent)
            if restored is not None:
                sequence, entry, length = restored
                self._insert(sequence, entry.states, entry.chats, is_saved=True)
                found = self._tree.longest(tokens, _serves)
                if found is None or found[0] < length:  # there is no room for it
                    return length, trimmed(entry.states, len(sequence) - length)
        if found is None:
            return None
        length, node = found
        assert node.entry is not None
        node.entry.floor = self._floor
        node.entry.goes_on(chat, length)
        node.entry.is_saved = False  # the disk is to know that it was used
        return length, trimmed(node.entry.states, node.depth - length)

    def insert(self, tokens: Sequence[int], states: Sequence[Any], chat: str = "") -> None:
        """Keep the states of one sequence after these tokens; the caller goes on with them.

        Nothing but `chat` is noted where an entry serves these tokens already, and nothing happens
        if the states alone are larger than the budget.

        Raises:
            ValueError: the states are of a kind that cannot be kept; see `can_keep`.
        """
        self._insert(tokens, states, {chat: len(tokens)} if chat else {})

    def _insert(
        self,
        tokens: Sequence[int],
        states: Sequence[Any],
        chats: Mapping[str, int],
        *,
        is_saved: bool = False,
    ) -> None:
        node, shared = self._tree.descend(tokens)
        longer = list(node.subtree()) if shared == len(tokens) else []
        for below in longer:
            assert below.entry is not None
            if _serves(below, len(tokens)):
                below.entry.floor = self._floor
                for chat, length in chats.items():
                    below.entry.goes_on(chat, length)
                return
        states = copied(states, compact=True)
        if longer:
            states = _sharing(states, longer[0], len(tokens))
        entry = Entry(states, self._floor, dict(chats), is_saved)
        if not tokens or sum(array.nbytes for array in entry.arrays()) > self.budget_bytes:
            return
        mx.async_eval(entry.arrays())  # or else they would keep alive all they come from
        node = self._tree.node(tokens)
        node.entry = entry
        self._take(entry)
        for above in list(node.ancestors()):
            assert above.entry is not None
            if entry.is_trimmable:
                for chat, length in above.entry.chats.items():
                    entry.goes_on(chat, length)
                self._remove(above)
            else:
                self._replace(above, _sharing(above.entry.states, node, above.depth))
        while self.nbytes > self.budget_bytes or self._count > MAX_ENTRIES:
            self._evict(newest=node)

    def shed(self, nbytes: int) -> None:
        """Drop the least valuable entries until that many bytes are freed or nothing is left."""
        target = max(0, self.nbytes - nbytes)
        while self.nbytes > target:
            self._evict()

    # The disk.

    def save_next(self) -> bool:
        """Save one entry that the disk does not have; False when there is none."""
        if self._spill is None:
            return False
        waiting = [node for node in self._tree.root.subtree() if not _entry(node).is_saved]
        if not waiting:
            return False
        # The longest first: shorter ones then are what it lacks.
        node = max(waiting, key=lambda node: node.depth)
        _entry(node).is_saved = True  # whatever comes of it: a fault would come again
        self._spill.save(node)
        return True

    def save(self, seconds: float) -> None:
        """Save what the disk does not have, until this time is up."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.save_next():
            pass

    def forget(self, chat: str) -> None:
        """Drop what is kept of a chat's words, in memory and on disk; of all words if it is "".

        What another chat goes on from stays, and is that chat's.

        Raises:
            OSError: a file cannot be removed.
        """
        if not chat:
            self.clear()
        else:
            tree = self._tree.root
            while node := next((n for n in tree.subtree() if chat in _entry(n).chats), None):
                self._forget(node, chat)
        if self._spill is not None:
            self._spill.forget(chat)
            for node in self._tree.root.subtree():
                _entry(node).is_saved = False  # it may have lain in a file that is gone

    def _forget(self, node: Node[Entry], chat: str) -> None:
        entry = _entry(node)
        del entry.chats[chat]
        length = max(entry.chats.values(), default=0)
        if length == node.depth:
            return
        above = list(node.ancestors())
        tokens = node.sequence
        self._remove(node)
        # Shorter entries may look at arrays of this one, which hold the rest of its words.
        for other in above:
            own = copied(_entry(other).states, compact=True)
            longer = next((below for below in other.subtree() if below is not other), None)
            self._replace(other, own if longer is None else _sharing(own, longer, other.depth))
        if length and entry.is_trimmable:
            states = trimmed(entry.states, len(tokens) - length)
            self._insert(tokens[:length], states, entry.chats)

    # What entries hold, and which of them goes.

    def _take(self, entry: Entry) -> None:
        self._count += 1
        for array in entry.arrays():
            _, users = self._held.get(id(array), (array, 0))
            self._held[id(array)] = array, users + 1
            if not users:
                self.nbytes += array.nbytes

    def _release(self, entry: Entry) -> None:
        self._count -= 1
        for array in entry.arrays():
            _, users = self._held.pop(id(array))
            if users > 1:
                self._held[id(array)] = array, users - 1
            else:
                self.nbytes -= array.nbytes

    def _remove(self, node: Node[Entry]) -> None:
        self._release(_entry(node))
        self._tree.remove(node)

    def _replace(self, node: Node[Entry], states: list[Any]) -> None:
        """The same entry, made of other arrays."""
        old = _entry(node)
        self._release(old)
        node.entry = Entry(states, old.floor, old.chats)
        mx.async_eval(node.entry.arrays())
        self._take(node.entry)

    def _evict(self, newest: Node[Entry] | None = None) -> None:
        """Drop the least valuable entry but the newest, which nothing could use yet."""
        others = (node for node in self._tree.root.subtree() if node is not newest)
        value, node = min(((self._value(node), node) for node in others), key=lambda pair: pair[0])
        self._floor = value
        self._remove(node)

    def _value(self, node: Node[Entry]) -> float:
        entry = _entry(node)
        assert node.parent is not None
        # Where a branch of states that can be trimmed begins, its siblings serve what is before.
        above = node.parent if entry.is_trimmable else next(node.ancestors(), self._tree.root)
        own = (array.nbytes for array in entry.arrays() if self._held[id(array)][1] == 1)
        return entry.floor + (node.depth - above.depth) / max(1, sum(own))


def _entry(node: Node[Entry]) -> Entry:
    assert node.entry is not None
    return node.entry


def _serves(node: Node[Entry], length: int) -> bool:
    return node.depth == length or _entry(node).is_trimmable


def _sharing(states: list[Any], longer: Node[Entry], length: int) -> list[Any]:
    """States after `length` tokens; what can be trimmed is a part of the longer entry's."""
    surplus = longer.depth - length

    def part_of(source: Any, leaf: Any) -> Any:
        if not is_trimmable(source):
            return leaf
        part = type(source).from_state(source.state)  # the same arrays
        part.trim(surplus)
        return part

    pairs = zip(leaves_of(_entry(longer).states), leaves_of(states), strict=True)
    return states_of([part_of(*pair) for pair in pairs], states)
