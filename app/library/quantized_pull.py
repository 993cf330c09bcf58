"""Pull a full-precision model and convert it, as one step.

The source is fetched as `app.library.pull` fetches it, resumed and checked in the same way, but not
installed: nobody asked for it, and it takes several times what the result does. It is converted
from where it was staged and removed once the result is installed, unless it is to be kept or was
installed before. One lock is held for all of it, that of a pull of the same repository.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from app.errors import GryphonError
from app.library import conversion
from app.library.conversion import ConversionPlan, target_of
from app.library.disk import existing, file_error, free_bytes
from app.library.hub import Hub
from app.library.hub_cache import RepositoryCache
from app.library.hub_errors import RepositoryChanged
from app.library.installed import InstalledModel, read_model
from app.library.pull import ATTEMPTS, PullPlan, fetch, make_plan, unsteady
from app.library.transfer import Status
from mlxmodels.packing import Packing


class Report(conversion.Report, Protocol):
    """Hears how both halves are doing. May raise to cancel."""

    def progress(self, status: Status) -> None:
        """Of the download; called some times a second."""


def plan_conversion(plan: PullPlan, packing: Packing, out: str | None) -> ConversionPlan:
    """What would be made of what a pull would bring.

    Raises:
        GryphonError: "unsupported_model" when it is quantized already, "usage" for a name that none
            can have.
    """
    repository = plan.repository
    base = repository.name.rpartition("/")[2]
    if repository.revision != "main":
        base += "-" + repository.revision.replace("/", "-")
    config, tensors = conversion.expected(repository.name, plan.config, plan.tensors, packing)
    return ConversionPlan(
        asked=plan.name,
        source=RepositoryCache(repository.name).snapshot(repository.commit),
        source_bytes=plan.total_bytes,
        target=target_of(out, f"{base}-{packing.suffix}"),
        packing=packing,
        config=config,
        tensors=tensors,
        origin={"source": plan.name, "commit": repository.commit},
        license=repository.license,
    )


def installed_already(plan: ConversionPlan) -> InstalledModel | None:
    """The result, if it is there, of this commit and packed as is asked.

    Raises:
        GryphonError: "target_exists" when something else is there.
    """
    if not plan.installed:
        return None
    record = conversion.read_record(plan.target)
    wanted = plan.origin | {"made": plan.packing.describe()}
    if any(record.get(key) != value for key, value in wanted.items()):
        conversion.refuse_taken(plan)
    return read_model(plan.target, plan.name, "gryphon")


def pull_converted(
    hub: Hub,
    plan: PullPlan,
    wanted: ConversionPlan,
    report: Report,
    *,
    keep_source: bool = False,
) -> InstalledModel:
    """Fetch, convert and install, or return the result when it is installed.

    Killed at any point, the next call goes on where it ended; what is not finished is never listed.

    Args:
        wanted: What `plan_conversion` says of the plan.

    Raises:
        GryphonError: as `app.library.pull.pull` and `app.library.conversion.convert`.
    """
    name, revision = plan.repository.name, plan.repository.revision
    cache = RepositoryCache(name)
    try:
        with cache.locked(report.waiting):
            for _ in range(ATTEMPTS):
                try:
                    return _pull_converted(hub, plan, wanted, report, cache, keep_source)
                except RepositoryChanged as error:
                    change = error
                plan = make_plan(hub, name, revision)
                now = plan_conversion(plan, wanted.packing, None)
                wanted = replace(now, target=wanted.target, shard_bytes=wanted.shard_bytes)
    except OSError as error:
        raise file_error(cache.path, name, error) from error
    raise unsteady(name, change)


def _pull_converted(
    hub: Hub,
    plan: PullPlan,
    wanted: ConversionPlan,
    report: Report,
    cache: RepositoryCache,
    keep_source: bool,
) -> InstalledModel:
    commit = plan.repository.commit
    is_installed = cache.is_installed(commit, plan.files)
    made = installed_already(wanted)
    source = cache.snapshot(commit)
    if not is_installed and (made is None or keep_source):
        _check_free_space(plan, wanted, cache)
        source = fetch(hub, plan, cache, report)
        if keep_source:
            source = cache.install(source, commit)
            cache.set_ref(plan.repository.revision, commit)
            is_installed = True
    if made is None:
        made = conversion.convert(replace(wanted, source=source), report)
    if not is_installed:
        cache.discard(plan.files)
    return made


def _check_free_space(plan: PullPlan, wanted: ConversionPlan, cache: RepositoryCache) -> None:
    """Before anything is fetched: the disk must hold both."""
    here, there = existing(cache.path), existing(wanted.target.parent)
    same_disk = here.stat().st_dev == there.stat().st_dev
    conversion.check_free_space(wanted, plan.missing_bytes if same_disk else 0)
    if not same_disk and free_bytes(here) < plan.missing_bytes:
        raise GryphonError(
            "disk_full",
            f"{plan.repository.name} needs {plan.missing_bytes / 1e9:.2f} GB more on the disk of "
            f"{here}. Free some space, or set HF_HUB_CACHE to another disk.",
        )
