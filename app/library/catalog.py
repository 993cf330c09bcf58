"""The catalog: quantized builds known to exist, by family, and what to do where there is none.

It comes with Gryphon, so it is there at once and without a network; the command line and the chat
show the same. catalog.toml says where each entry is from.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal
from urllib.parse import urlsplit

from app.errors import GryphonError
from app.library.fit import Budget, Fit, fit_of_totals

_REPO = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Build:
    """A quantized model on the hub."""

    repo: str
    """ORG/NAME: what `gryphon pull` takes, and what it is called once it is installed."""
    family: str
    """`model_type` of its config.json."""
    bits: int
    parameters: int
    size_bytes: int
    """Of its weights."""
    size_from: Literal["files", "arithmetic"]
    packed_embedding: bool
    """Whether the embedding is quantized too."""
    license: str
    context: int
    """Tokens that it can attend to."""
    good_for: str
    source: str
    """A public page that names it."""
    config: Mapping[str, int]
    """The sizes of its config.json."""

    def fit(self, budget: Budget) -> Fit:
        """Whether it fits this machine, about, and with which context."""
        named = {"model_type": self.family, "max_position_embeddings": self.context}
        config = {**named, **self.config}
        return fit_of_totals(config, self.parameters, self.size_bytes, budget)


@dataclass(frozen=True)
class Family:
    """The builds of one model_type."""

    name: str
    title: str
    builds: tuple[Build, ...]
    instead: str
    """What to do where there is no build; empty where there is one."""

    def matching(self, words: str) -> Family | None:
        """The part of it that has all the words in its names; None if there is none."""
        wanted = words.lower().split()
        mine = f"{self.name} {self.title}".lower()
        found = tuple(
            build
            for build in self.builds
            if all(word in f"{mine} {build.repo} {build.good_for}".lower() for word in wanted)
        )
        if not found and not all(word in mine for word in wanted):
            return None
        return Family(self.name, self.title, found or self.builds, self.instead)


@functools.cache
def families() -> tuple[Family, ...]:
    """All of them, in the order of the file: our own ports first."""
    text = resources.files("app.library").joinpath("catalog.toml").read_text(encoding="utf-8")
    return parse(text)


def parse(text: str) -> tuple[Family, ...]:
    """The families of a catalog in TOML.

    Raises:
        GryphonError: "invalid_catalog", naming the entry and what is wrong with it.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _invalid(f"it is not TOML: {error}") from error
    _keys("the catalog", values, {"families"})
    found = tuple(_family(name, fields) for name, fields in values["families"].items())
    repos = [build.repo.lower() for family in found for build in family.builds]
    if twice := {repo for repo in repos if repos.count(repo) > 1}:
        raise _invalid(f"{min(twice)} is there twice")
    return found


def _family(name: str, fields: Any) -> Family:
    _keys(name, fields, {"title"}, {"builds", "instead"})
    builds = tuple(_build(name, one) for one in fields.get("builds", []))
    instead = fields.get("instead", "")
    _expect(name, "title", fields["title"], isinstance(fields["title"], str))
    _expect(name, "instead", instead, isinstance(instead, str) and bool(instead) != bool(builds))
    return Family(name, fields["title"], builds, instead)


def _build(family: str, fields: Any) -> Build:
    required = {"repo", "bits", "parameters", "size_bytes", "size_from", "license", "context",
                "good_for", "source", "config"}  # fmt: skip
    name = str(fields.get("repo", family)) if isinstance(fields, dict) else family
    _keys(name, fields, required, {"packed_embedding"})
    packed = fields.get("packed_embedding", True)
    source, config = fields["source"], fields["config"]
    _expect(name, "repo", name, _REPO.fullmatch(name))
    _expect(name, "bits", fields["bits"], fields["bits"] in _BITS)
    for key in ("parameters", "size_bytes", "context"):
        _expect(name, key, fields[key], type(fields[key]) is int and fields[key] > 0)
    for key in ("license", "good_for"):
        text = fields[key]
        _expect(name, key, text, isinstance(text, str) and text and text.isprintable())
    _expect(name, "size_from", fields["size_from"], fields["size_from"] in ("files", "arithmetic"))
    _expect(name, "packed_embedding", packed, type(packed) is bool)
    _expect(name, "source", source, isinstance(source, str) and _is_page(source))
    sizes = isinstance(config, dict) and all(type(n) is int and n > 0 for n in config.values())
    _expect(name, "config", config, sizes and config)
    return Build(family=family, **(fields | {"packed_embedding": packed}))


def _is_page(address: str) -> bool:
    parts = urlsplit(address)
    return parts.scheme == "https" and "." in parts.netloc and address.isascii()


def _keys(name: str, fields: Any, required: Set[str], optional: Set[str] = frozenset()) -> None:
    if not isinstance(fields, dict):
        raise _invalid(f"{name} is no table")
    if missing := required - fields.keys():
        raise _invalid(f"{name} has no {min(missing)}")
    if unknown := fields.keys() - required - optional:
        raise _invalid(f"{name} has {min(unknown)}, which is not known")


def _expect(name: str, key: str, value: Any, is_right: Any) -> None:
    if not is_right:
        raise _invalid(f"{name} has the {key} {value!r}")


def _invalid(what: str) -> GryphonError:
    return GryphonError("invalid_catalog", f"Gryphon's catalog of models is damaged: {what}.")
