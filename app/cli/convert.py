"""`gryphon convert` and `gryphon pull -q`: what would be made, the question, progress, and how to
go on after Ctrl-C."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.cli.pull import JsonView, View, fit_of_plan, progress_text
from app.cli.terminal import bar, can_ask, confirm, human_bytes
from app.errors import GryphonError
from app.library import embedded
from app.machine import binary_bytes

if TYPE_CHECKING:
    from app.library.conversion import ConversionPlan
    from app.library.evaluation import Evaluation
    from app.library.fit import Fit
    from app.library.installed import InstalledModel
    from app.library.pull import PullPlan
    from app.library.transfer import Status


def convert(arguments: argparse.Namespace) -> int:
    """Convert a checkpoint on this machine."""
    from app.library import conversion

    asked = _packing(arguments, dtype=arguments.dtype)
    shard_bytes = conversion.shard_bytes_asked(arguments.shard_bytes)
    with ConvertJson() if arguments.json else ConvertView(arguments.source) as view:
        view.looking("reading what it holds")
        plan = conversion.make_plan(arguments.source, asked, arguments.out)
        plan = dataclasses.replace(plan, shard_bytes=shard_bytes)
        fit = fit_of_plan(plan)
        view.made_plan(plan, fit, dry_run=arguments.dry_run)
        if arguments.dry_run:
            return 0
        conversion.refuse_taken(plan)
        conversion.check_free_space(plan)
        evaluated = _evaluation(arguments, plan, view)
        _ask_about(arguments, plan, fit, f"Convert it, {human_bytes(plan.work_bytes)}?")
        model = conversion.convert(plan, view)
        view.installed(model, already=False)
        evaluated(model)
    return 0


def pull_converted(arguments: argparse.Namespace) -> int:
    """Fetch a full-precision model and convert it."""
    if arguments.name == embedded.NAME:
        raise GryphonError("usage", f"{embedded.NAME} is quantized already; pull it without -q.")
    # Only now: huggingface_hub's client takes a moment to import.
    from app.library import conversion, quantized_pull
    from app.library.hub import Hub
    from app.library.pull import make_plan, parse_name

    asked = _packing(arguments)
    shard_bytes = conversion.shard_bytes_asked(arguments.shard_bytes)
    name, revision = parse_name(arguments.name, arguments.revision)
    again = f"gryphon pull {arguments.name} {_words(arguments)}"
    view = ConvertJson() if arguments.json else ConvertView(name, again)
    with Hub(tell=view.looking) as hub, view:
        view.looking("asking the hub")
        source = make_plan(hub, name, revision)
        plan = quantized_pull.plan_conversion(source, asked, arguments.out)
        plan = dataclasses.replace(plan, shard_bytes=shard_bytes)
        model = quantized_pull.installed_already(plan)
        fit = fit_of_plan(plan)
        if model is None or arguments.dry_run:
            view.made_plan(plan, fit, source, keep=arguments.keep_source, dry_run=arguments.dry_run)
        if arguments.dry_run:
            return 0
        if model is not None and not (arguments.keep_source and not source.installed):
            view.installed(model, already=True)
            return 0
        fetched = human_bytes(source.missing_bytes)
        _ask_about(arguments, plan, fit, f"Download {fetched} and convert it?")
        model = quantized_pull.pull_converted(
            hub, source, plan, view, keep_source=arguments.keep_source
        )
        view.installed(model, already=False)
    return 0


def _packing(arguments: argparse.Namespace, dtype: str | None = None) -> Any:
    from app.library.conversion import packing_asked

    return packing_asked(
        bits=arguments.bits,
        group_size=arguments.group_size,
        mode=arguments.mode,
        recipe=arguments.recipe,
        dtype=dtype,
    )


def _words(arguments: argparse.Namespace) -> str:
    """The options that make the same result, to be typed again."""
    options = {
        "--revision": arguments.revision,
        "-q": arguments.bits,
        "--group-size": arguments.group_size,
        "--mode": arguments.mode,
        "--recipe": arguments.recipe,
        "--out": arguments.out,
        "--shard-bytes": arguments.shard_bytes,
    }
    words = [f"{option} {value}" for option, value in options.items() if value is not None]
    return " ".join([*words, *(["--keep-source"] if arguments.keep_source else [])])


def _ask_about(
    arguments: argparse.Namespace, plan: ConversionPlan, fit: Fit | None, question: str
) -> None:
    default = True
    if fit is not None and fit.verdict == "does not fit":
        if not arguments.yes and not can_ask():
            raise GryphonError(
                "does_not_fit",
                f"{plan.name} would not fit this machine: it takes "
                f"{binary_bytes(fit.footprint.least_bytes)} at least, and there are "
                f"{binary_bytes(fit.budget.bytes)} ({fit.budget.source}). Nothing was done; "
                "`--yes` makes it all the same.",
            )
        question, default = f"The result does not fit this machine. {question}", False
    if not arguments.yes and can_ask() and not confirm(question, default=default):
        raise GryphonError("declined", "Nothing was done.")


def _evaluation(
    arguments: argparse.Namespace, plan: ConversionPlan, view: ConvertView
) -> Callable[[InstalledModel], None]:
    """Checks that `--eval` can be done; returns what does it, once there is a result."""
    if arguments.eval is None:
        return lambda model: None
    from app.cli.fit import current_budget
    from app.library import evaluation

    text: Path = arguments.eval
    if not text.is_file():
        raise GryphonError("usage", f"--eval {text} is not a file.")
    budget = current_budget()
    if not plan.is_gguf:
        evaluation.check_memory(plan.source, budget)

    def evaluated(model: InstalledModel) -> None:
        def of(path: Path, name: str) -> Evaluation:
            return evaluation.evaluate(
                path, text, budget, lambda done, total: view.evaluating(name, done, total)
            )

        before = None if plan.is_gguf else of(plan.source, "source")
        view.evaluated(before, of(model.path, model.name))

    return evaluated


class ConvertView(View):
    """A conversion for people."""

    def __init__(self, asked: str, again: str = "The same command") -> None:
        super().__init__(asked)
        self._again = f"`{again}`" if " -" in again else again
        self._is_made = False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.line.clear()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            more = "" if self._is_made else f" {self._again} goes on from here."
            print(f"Interrupted{self.kept_text}.{more}", file=sys.stderr)

    def made_plan(
        self,
        plan: ConversionPlan,
        fit: Fit | None,
        source: PullPlan | None = None,
        *,
        keep: bool = False,
        dry_run: bool = False,
    ) -> None:
        """Say what would be made."""
        self.line.clear()
        output = sys.stdout if dry_run else sys.stderr
        print(describe_plan(plan, fit, source, keep=keep), file=output, flush=True)

    def waiting(self) -> None:
        self.line.show(f"{self.asked}: waiting for another pull or conversion of it")

    def progress(self, status: Status) -> None:
        self.kept_text = f": {human_bytes(status.done)} of {human_bytes(status.total)} are fetched"
        self.line.show(progress_text(self.asked, status))

    def converting(self, done: int, total: int) -> None:
        self.line.show(f"{self.asked}: converting {bar(done, total)}")

    def kept(self, shards: int, of: int) -> None:
        self.kept_text = f": {shards} of {of} files of the result are kept"

    def evaluating(self, name: str, done: int, total: int) -> None:
        self._is_made, self.kept_text = (
            True,
            ": the result is installed, the text not read to its end",
        )
        self.line.show(f"reading the text with {name} {bar(done, total)}")

    def evaluated(self, before: Evaluation | None, after: Evaluation) -> None:
        """Say how well source and result foretell the text."""
        self.line.clear()
        what = f"perplexity over {after.tokens} tokens in windows of {after.window}"
        if before is None:
            print(f"{what}: {after.perplexity:.4g} (a GGUF itself cannot be read for comparison)")
            return
        change = _change(before, after)
        words = "" if change is None else f" ({change:+.2%})"
        print(f"{what}: {before.perplexity:.4g} before, {after.perplexity:.4g} after{words}")


class ConvertJson(JsonView, ConvertView):
    """A conversion for programs: one JSON object a line on standard output."""

    def __init__(self) -> None:
        JsonView.__init__(self)
        self._again = ""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        JsonView.__exit__(self, kind)

    def made_plan(
        self,
        plan: ConversionPlan,
        fit: Fit | None,
        source: PullPlan | None = None,
        *,
        keep: bool = False,
        dry_run: bool = False,
    ) -> None:
        from app.cli.fit import fit_as_json

        fetched = (
            {}
            if source is None
            else {
                "repository": source.repository.name,
                "revision": source.repository.revision,
                "commit": source.repository.commit,
                "missing_bytes": source.missing_bytes,
                "here_bytes": source.here_bytes,
                "source_installed": source.installed,
                "keep_source": keep,
            }
        )
        self.write(
            "plan",
            name=plan.name,
            path=str(plan.target),
            source=plan.asked,
            family=plan.config.get("model_type"),
            quantization=plan.packing.describe(),
            total_bytes=plan.source_bytes,
            result_bytes=plan.result_bytes,
            free_bytes=plan.free_bytes,
            installed=plan.installed,
            fit=None if fit is None else fit_as_json(fit),
            **fetched,
        )

    def converting(self, done: int, total: int) -> None:
        if self.is_due(["converting"]):
            self.write("converting", done=done, total=total)

    def kept(self, shards: int, of: int) -> None:
        self.write("kept", shards=shards, of=of)

    def evaluating(self, name: str, done: int, total: int) -> None:
        if self.is_due(["evaluating", name]):
            self.write("evaluating", name=name, done=done, total=total)

    def evaluated(self, before: Evaluation | None, after: Evaluation) -> None:
        self.write(
            "evaluated",
            source_perplexity=None if before is None else _finite(before.perplexity),
            perplexity=_finite(after.perplexity),
            change=None if before is None else _change(before, after),
            tokens=after.tokens,
            window=after.window,
        )


def _change(before: Evaluation, after: Evaluation) -> float | None:
    change = after.perplexity / before.perplexity - 1
    return change if math.isfinite(change) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def describe_plan(
    plan: ConversionPlan, fit: Fit | None, source: PullPlan | None, *, keep: bool = False
) -> str:
    """What would be fetched and made, before anybody is asked."""
    from app.cli.fit import fit_rows, in_columns

    floats = f"{human_bytes(plan.source_bytes)} of {plan.asked}"
    rows = [("family", str(plan.config.get("model_type")))]
    if source is not None:
        here = f", of which {human_bytes(source.here_bytes)} are here" if source.here_bytes else ""
        stays = keep or source.installed
        then = "stays as a model too" if stays else "goes when it is converted"
        rows += [
            ("license", source.repository.license or "not stated"),
            ("download", f"{human_bytes(source.total_bytes)} ({source.quantization}){here}"),
            ("after that", f"{then}{'' if stays else '; --keep-source keeps it'}"),
        ]
    else:
        rows.append(("source", floats))
    rows += [
        ("result", f"about {human_bytes(plan.result_bytes)}, {plan.packing.describe()}"),
        ("path", str(plan.target)),
        ("free", f"{human_bytes(plan.free_bytes)} on this disk"),
    ]
    if kept := plan.here_bytes:
        rows.append(("begun", f"{human_bytes(kept)} from an earlier run"))
    if fit is None:
        rows.append(("verdict", "unknown: its config.json does not say what it takes in memory"))
    else:
        rows += fit_rows(plan.name, fit)
    if plan.installed:
        rows.append(("installed", "something is there already"))
    return f"{plan.name} from {plan.asked}\n{textwrap.indent(in_columns(rows), '  ')}"
