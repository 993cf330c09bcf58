"""A radix tree over token ids: values by the sequence that leads to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from app.engine.preparation import shared_length

V = TypeVar("V")


@dataclass(eq=False)
class Node(Generic[V]):
    """The tokens of the edge from its parent to it, and how many lead here from the root."""

    tokens: list[int] = field(default_factory=list)
    depth: int = 0
    parent: Node[V] | None = None
    children: dict[int, Node[V]] = field(default_factory=dict)
    """By the first token of their edge."""
    entry: V | None = None

    def subtree(self) -> Iterator[Node[V]]:
        """This node and all below that hold an entry."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            if node.entry is not None:
                yield node
            waiting.extend(node.children.values())

    def ancestors(self) -> Iterator[Node[V]]:
        """Nodes above this one that hold an entry, the nearest first."""
        node = self.parent
        while node is not None:
            if node.entry is not None:
                yield node
            node = node.parent

    @property
    def sequence(self) -> list[int]:
        """All tokens from the root to here."""
        edges = []
        node: Node[V] | None = self
        while node is not None:
            edges.append(node.tokens)
            node = node.parent
        return [token for edge in reversed(edges) for token in edge]


class TokenTree(Generic[V]):
    """Nodes without an entry are there only where branches part."""

    def __init__(self) -> None:
        self.root: Node[V] = Node()

    def descend(self, tokens: Sequence[int]) -> tuple[Node[V], int]:
        """How many tokens the tree shares with these, and the node at or next below that point."""
        node, matched = self.root, 0
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

    def longest(
        self, tokens: Sequence[int], serves: Callable[[Node[V], int], bool]
    ) -> tuple[int, Node[V]] | None:
        """The longest prefix that an entry serves and that leaves at least the last token.

        Args:
            serves: Whether the entry of a node serves its first so many tokens, at most its depth.
        """
        node, shared = self.descend(tokens)
        shared = min(shared, len(tokens) - 1)
        while shared > 0:
            # All entries from this node on have `shared` tokens in common with the prompt.
            for found in node.subtree():
                if serves(found, shared):
                    return shared, found
            assert node.parent is not None
            node = node.parent
            shared = min(shared, node.depth)
        return None

    def find(self, tokens: Sequence[int]) -> Node[V] | None:
        """The node of exactly these tokens, if it holds an entry."""
        node, shared = self.descend(tokens)
        is_it = shared == node.depth == len(tokens)
        return node if is_it and node.entry is not None else None

    def node(self, tokens: Sequence[int]) -> Node[V]:
        """The node of exactly these tokens, made if it is missing; give it an entry."""
        node, matched = self.descend(tokens)
        if matched < node.depth:
            cut = len(node.tokens) - (node.depth - matched)
            assert node.parent is not None
            upper = Node(node.tokens[:cut], matched, node.parent, {node.tokens[cut]: node})
            node.parent.children[upper.tokens[0]] = upper
            node.tokens, node.parent = node.tokens[cut:], upper
            node = upper
        if matched < len(tokens):
            leaf = Node(list(tokens[matched:]), len(tokens), node)
            node.children[leaf.tokens[0]] = leaf
            node = leaf
        return node

    def remove(self, node: Node[V]) -> None:
        """Make a node one without an entry, and the tree as small as it can be."""
        node.entry = None
        while node.parent is not None and node.entry is None and not node.children:
            del node.parent.children[node.tokens[0]]
            node = node.parent
        if node.parent is not None and node.entry is None and len(node.children) == 1:
            (child,) = node.children.values()
            child.tokens, child.parent = node.tokens + child.tokens, node.parent
            node.parent.children[child.tokens[0]] = child
