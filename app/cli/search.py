"""`gryphon search`: models of the hub, or of the catalog that comes with Gryphon."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from typing import TYPE_CHECKING

from app.cli.fit import current_budget
from app.cli.terminal import StatusLine, human_bytes, table
from app.errors import GryphonError
from app.library.installed import installed_models

if TYPE_CHECKING:
    from app.library.fit import Fit

_NOTE = (
    "\nFITS: the longest context here, about. `gryphon pull --dry-run NAME` has the arithmetic,\n"
    "and `gryphon pull NAME` fetches one."
)


def search(arguments: argparse.Namespace) -> int:
    """Print models that could be pulled."""
    if arguments.limit < 1:
        raise GryphonError("usage", f"--limit must be at least 1, got {arguments.limit}.")
    if arguments.catalog:
        return _catalog(arguments.query or "", as_json=arguments.json)
    if not arguments.query:
        raise GryphonError(
            "usage", "What for? gryphon search WORDS, or `gryphon search --catalog` without any."
        )
    return _hub(arguments)


def _hub(arguments: argparse.Namespace) -> int:
    from app.library.hub import Hub
    from app.library.search import fits
    from app.library.search import search as search_hub

    line = StatusLine()
    budget = current_budget()
    with Hub(tell=line.show) as hub:
        line.show("asking the hub")
        try:
            found = search_hub(hub, arguments.query, min(arguments.limit, 100))
            line.show("reading what the models need")
            verdicts = fits(hub, found, budget)
        finally:
            line.clear()
    if arguments.json:
        fields = [
            dataclasses.asdict(one)
            | {
                "verdict": None if fit is None else fit.verdict,
                "largest_context": None if fit is None else fit.largest_context,
            }
            for one, fit in zip(found, verdicts, strict=True)
        ]
        print(json.dumps(fields, indent=2))
    elif not found:
        print(f"The hub has nothing that runs here under {arguments.query!r}. Try fewer words.")
    else:
        here = {model.name for model in installed_models()}
        rows = [
            (
                one.name,
                human_bytes(one.weight_bytes),
                one.family,
                one.quantization,
                str(one.downloads),
                _fits(fit, one.weight_bytes > budget.bytes),
                "installed" if one.name in here else "gated" if one.gated else "",
            )
            for one, fit in zip(found, verdicts, strict=True)
        ]
        print(table(["NAME", "SIZE", "FAMILY", "QUANTIZATION", "DOWNLOADS", "FITS", ""], rows))
        print(_NOTE)
    return 0


def _fits(fit: Fit | None, is_too_large: bool) -> str:
    if is_too_large or (fit is not None and fit.verdict == "does not fit"):
        return "no"
    if fit is None:
        return "?"
    context = "any" if fit.largest_context is None else f"{fit.largest_context} tokens"
    return context if fit.verdict == "fits" else f"{context}, slowly"


def _catalog(words: str, *, as_json: bool) -> int:
    from app.library.catalog import families

    budget = current_budget()
    here = {model.name for model in installed_models()}
    found = [part for family in families() if (part := family.matching(words)) is not None]
    if as_json:
        fields = [
            {
                "family": family.name,
                "title": family.title,
                "instead": family.instead or None,
                "builds": [
                    dataclasses.asdict(build)
                    | {
                        "verdict": (fit := build.fit(budget)).verdict,
                        "largest_context": fit.largest_context,
                        "installed": build.repo in here,
                    }
                    for build in family.builds
                ],
            }
            for family in found
        ]
        print(json.dumps(fields, indent=2))
        return 0
    if not found:
        print(f"The catalog has nothing under {words!r}; `gryphon search {words}` asks the hub.")
        return 0
    for family in found:
        print(family.title)
        if family.instead:
            print(textwrap.indent(textwrap.fill(family.instead, 96, break_on_hyphens=False), "  "))
        else:
            rows = [
                (
                    build.repo,
                    f"{build.bits}-bit",
                    human_bytes(build.size_bytes),
                    str(build.context),
                    _fits(build.fit(budget), False),
                    build.license,
                    build.good_for + (" (installed)" if build.repo in here else ""),
                )
                for build in family.builds
            ]
            header = ["NAME", "BITS", "SIZE", "CONTEXT", "FITS", "LICENSE", "GOOD FOR"]
            print(textwrap.indent(table(header, rows), "  "))
        print()
    print(_NOTE.lstrip("\n"))
    return 0
