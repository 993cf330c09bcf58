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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from app.engine.preparation import shared_length
from mlxmodels import state_kinds

# A bound on the work of choosing what goes, for models whose states are tiny.
MAX_ENTRIES = 512
# Growing states that can be trimmed at any length: no entry inside a prompt is worth making.
_ALWAYS_TRIMMABLE = {"FullCache", "KVCache", "QuantizedKVCache"}
# Those that can be trimmed as long as they say so. mlx-lm's ConcatenateKVCache says so and keeps
# what it takes back; its ChunkedKVCache says so when it has dropped its beginning.
_TRIMMABLE = _ALWAYS_TRIMMABLE | {"WindowCache", "RotatingKVCache"}


def can_keep(states: Sequence[Any]) -> bool:
    """Whether the states of a model's layers, as it makes them, are of kinds that can be kept."""
    try:
        for state in states:
            _copied(state)
    except ValueError:
        return False
    return True


def always_trimmable(states: Sequence[Any]) -> bool:
    """Whether an entry of these states serves every shorter prefix, however long it is."""
    return all(type(state).__name__ in _ALWAYS_TRIMMABLE for state in states)


@dataclass(eq=False)
class _Entry:
    """States after the tokens on the way to a node; `floor` is the cache's at their last use."""

    states: list[Any]
    floor: float = 0.0

    def __post_init__(self) -> None:
        self.is_trimmable = all(_is_trimmable(state) for state in self.states)

    def arrays(self) -> list[mx.array]:
        return list(_arrays_in([state.state for state in self.states]))


@dataclass(eq=False)
class _Node:
    """The tokens of the edge from its parent to it, and how many lead here from the root."""

    tokens: list[int] = field(default_factory=list)
    depth: int = 0
    parent: _Node | None = None
    children: dict[int, _Node] = field(default_factory=dict)
    """By the first token of their edge."""
    entry: _Entry | None = None

    def subtree(self) -> Iterator[_Node]:
        """This node and all below that hold an entry."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            if node.entry is not None:
                yield node
            waiting.extend(node.children.values())

    def ancestors(self) -> Iterator[_Node]:
        """Nodes above this one that hold an entry, the nearest first."""
        node = self.parent
        while node is not None:
            if node.entry is not None:
                yield node
            node = node.parent


class PrefixCache:
    """Entries up to a number of bytes; used by one thread, the one that owns MLX.

    The least valuable entry goes first. An entry's value is what it saves, the tokens that no other
    entry of its branch would serve, per byte it would free, plus the value of what went last at the
    time it was used: so what is not used sinks below what is new, the sooner the cheaper it is to
    compute again (GreedyDual-Size).
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        """Bytes of all entries; what several share counts once."""
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._root = _Node()
        self._floor = 0.0
        self._held: dict[int, tuple[mx.array, int]] = {}
        self._count = 0
        self.nbytes = 0

    def __len__(self) -> int:
        return self._count

    def find(self, tokens: Sequence[int]) -> tuple[int, list[Any]] | None:
        """The longest usable prefix that leaves at least the last token to be computed.

        Returns:
            Its length and states of the caller's own after it, or None.
        """
        node, shared = self._descend(tokens)
        shared = min(shared, len(tokens) - 1)
        while shared > 0:
            # All entries from this node on have `shared` tokens in common with the prompt.
            for found in node.subtree():
                assert found.entry is not None
                if found.depth == shared or found.entry.is_trimmable:
                    return shared, self._lend(found.entry, found.depth - shared)
            assert node.parent is not None
            node = node.parent
            shared = min(shared, node.depth)
        return None

    def insert(self, tokens: Sequence[int], states: Sequence[Any]) -> None:
        """Keep the states of one sequence after these tokens; the caller goes on with them.

        Nothing happens where an entry serves these tokens already, or if the states alone are
        larger than the budget.

        Raises:
            ValueError: the states are of a kind that cannot be kept; see `can_keep`.
        """
        node, shared = self._descend(tokens)
        longer = list(node.subtree()) if shared == len(tokens) else []
        for below in longer:
            assert below.entry is not None
            if below.depth == shared or below.entry.is_trimmable:
                below.entry.floor = self._floor
                return
        states = [_copied(state, compact=True) for state in states]
        if longer:
            states = _sharing(states, longer[0], len(tokens))
        entry = _Entry(states, self._floor)
        if not tokens or sum(array.nbytes for array in entry.arrays()) > self.budget_bytes:
            return
        mx.async_eval(entry.arrays())  # or else they would keep alive all they come from
        node = self._node(tokens, node, shared)
        node.entry = entry
        self._take(entry)
        for above in list(node.ancestors()):
            assert above.entry is not None
            self._release(above.entry)
            if entry.is_trimmable:
                self._remove(above)
            else:
                states = _sharing(above.entry.states, node, above.depth)
                above.entry = _Entry(states, above.entry.floor)
                self._take(above.entry)
        while self.nbytes > self.budget_bytes or self._count > MAX_ENTRIES:
            self._evict(newest=node)

    def shed(self, nbytes: int) -> None:
        """Drop the least valuable entries until that many bytes are freed or nothing is left."""
        target = max(0, self.nbytes - nbytes)
        while self.nbytes > target:
            self._evict()

    def _lend(self, entry: _Entry, surplus: int) -> list[Any]:
        """States for a caller to change, without the last `surplus` tokens."""
        entry.floor = self._floor
        states = [_copied(state) for state in entry.states]
        if surplus:
            for state in states:
                state.trim(surplus)
            states = [_copied(state) for state in states]  # without the slots that leaves unused
        return states

    # The tree.

    def _descend(self, tokens: Sequence[int]) -> tuple[_Node, int]:
        """How many tokens the tree shares with these, and the node at or next below that point."""
        node, matched = self._root, 0
        while matched < len(tokens):
            child = node.children.get(tokens[matched])
            if child is None:
                break
            rest = tokens[matched : matched + len(child.tokens)]
            shared = shared_length(child.tokens, rest)
            node, matched = child, matched + shared
            if shared < len(child.tokens):
                break
        return node, matched

    def _node(self, tokens: Sequence[int], node: _Node, matched: int) -> _Node:
        """The node of exactly these tokens, made where `_descend` ended."""
        if matched < node.depth:
            cut = len(node.tokens) - (node.depth - matched)
            assert node.parent is not None
            upper = _Node(node.tokens[:cut], matched, node.parent, {node.tokens[cut]: node})
            node.parent.children[upper.tokens[0]] = upper
            node.tokens, node.parent = node.tokens[cut:], upper
            node = upper
        if matched < len(tokens):
            leaf = _Node(list(tokens[matched:]), len(tokens), node)
            node.children[leaf.tokens[0]] = leaf
            node = leaf
        return node

    def _remove(self, node: _Node) -> None:
        """Make a node one without an entry, and the tree as small as it can be."""
        node.entry = None
        while node.parent is not None and node.entry is None and not node.children:
            del node.parent.children[node.tokens[0]]
            node = node.parent
        if node.parent is not None and node.entry is None and len(node.children) == 1:
            (child,) = node.children.values()
            child.tokens, child.parent = node.tokens + child.tokens, node.parent
            node.parent.children[child.tokens[0]] = child

    # What entries hold, and which of them goes.

    def _take(self, entry: _Entry) -> None:
        self._count += 1
        for array in entry.arrays():
            _, users = self._held.get(id(array), (array, 0))
            self._held[id(array)] = array, users + 1
            if not users:
                self.nbytes += array.nbytes

    def _release(self, entry: _Entry) -> None:
        self._count -= 1
        for array in entry.arrays():
            _, users = self._held.pop(id(array))
            if users > 1:
                self._held[id(array)] = array, users - 1
            else:
                self.nbytes -= array.nbytes

    def _evict(self, newest: _Node | None = None) -> None:
        """Drop the least valuable entry but the newest, which nothing could use yet."""
        others = (node for node in self._root.subtree() if node is not newest)
        value, node = min(((self._value(node), node) for node in others), key=lambda pair: pair[0])
        assert node.entry is not None
        self._floor = value
        self._release(node.entry)
        self._remove(node)

    def _value(self, node: _Node) -> float:
        assert node.entry is not None and node.parent is not None
        # Where a branch of states that can be trimmed begins, its siblings serve what is before.
        above = node.parent if node.entry.is_trimmable else next(node.ancestors(), self._root)
        own = (array.nbytes for array in node.entry.arrays() if self._held[id(array)][1] == 1)
        return node.entry.floor + (node.depth - above.depth) / max(1, sum(own))


def _is_trimmable(state: Any) -> bool:
    return type(state).__name__ in _TRIMMABLE and bool(state.is_trimmable())


def _sharing(states: list[Any], longer: _Node, length: int) -> list[Any]:
    """States after `length` tokens; what can be trimmed is a part of the longer entry's."""
    assert longer.entry is not None
    surplus = longer.depth - length

    def part_of(source: Any, state: Any) -> Any:
        if state_kinds.name_of(state) == state_kinds.CONTAINER:
            parts = zip(source.caches, state.caches, strict=True)
            return state_kinds.container([part_of(*pair) for pair in parts])
        if not _is_trimmable(source):
            return state
        part = type(source).from_state(source.state)  # the same arrays
        part.trim(surplus)
        return part

    return [part_of(*pair) for pair in zip(longer.entry.states, states, strict=True)]


def _arrays_in(value: Any) -> Iterator[mx.array]:
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _arrays_in(item)


def _copied(state: Any, *, compact: bool = False) -> Any:
    """A state of its own with the same content and no spare slots.

    Arrays are shared until one of both is written to: ours are never written in place, and to the
    arrays of mlx-lm's states, which are, the copy has handles of its own.

    Args:
        compact: Whether arrays that are a part of larger ones become independent of them.

    Raises:
        ValueError: it is of a kind that cannot be taken apart.
    """
    name = state_kinds.name_of(state)
    if name == state_kinds.CONTAINER:
        return state_kinds.container([_copied(part, compact=compact) for part in state.caches])

    def own(value: Any) -> Any:
        if isinstance(value, mx.array):
            return mx.contiguous(value) if compact else value[...]
        return [own(item) for item in value] if isinstance(value, list | tuple) else value

    fields = state_kinds.fields_of(state)
    return state_kinds.restore(name, {key: own(value) for key, value in fields.items()})
