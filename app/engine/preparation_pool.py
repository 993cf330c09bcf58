"""Several prompts prepared at once, so that a slow one delays those who sent it and nobody else.

A few processes (`app.engine.preparation`), started as prompts wait for one. All but one of them
take any prompt. The last takes only what may well be quick: small prompts, for a model with none
under way and whose last one was not slow. So what is slow, a book or a template that loops, does
not hold all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

import msgspec

from app.engine.preparation import Preparer
from app.engine.preparation_work import Prepared, Prompt, TokenizedPrompt, Work
from app.engine.turns import Turns
from app.engine.waiting import check_room

PROCESSES = 3
# Tokenizers take a tenth of a second for so much.
_SMALL_BYTES = 128 * 1024
_QUICK_S = 1.0
# The same where the process starts first, or loads the model's tokenizer.
_QUICK_AT_FIRST_S = 5.0
# A busy process that has been so for less is not slow: another takes longer to start.
_START_AFTER_S = 0.2
# What has not been used for this long ends, but for one.
_IDLE_S = 60.0


@dataclass(eq=False)
class _Job:
    """A prompt that waits for a process or is with one."""

    client: str
    model_path: str
    is_small: bool
    process: asyncio.Future[_Process] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


@dataclass(eq=False)
class _Process:
    """A preparation process, and what it does: a job since then, or nothing."""

    preparer: Preparer
    job: _Job | None = None
    is_quick: bool = False
    """Whether the job was as good as known to be quick when it began."""
    quick_s: float = _QUICK_S
    """What quick means for the job."""
    since_s: float = 0.0
    model_path: str = ""
    """Of its last job: it has that model's tokenizer."""


class PreparationPool:
    """Prepares prompts in at most `PROCESSES` processes; used from one event loop.

    Clients take turns (`app.engine.turns`).

    Args:
        time_limit_s: How long preparing one prompt may take.
        idle_s: After how long processes that nobody needs end.
    """

    def __init__(self, time_limit_s: float, idle_s: float = _IDLE_S) -> None:
        self._time_limit_s = time_limit_s
        self._idle_s = idle_s
        self._waiting: list[_Job] = []
        self._processes: list[_Process] = []
        self._turns = Turns()
        self._suspects: set[str] = set()
        """Models with a small prompt under way, or whose last one took long."""
        self._proven: set[str] = set()
        """Models whose last small prompt was quick."""
        self._ending: set[asyncio.Task[None]] = set()

    async def prepare(self, prompt: Prompt, client: str = "") -> TokenizedPrompt:
        """Token ids of a prompt, at least one.

        Raises:
            GryphonError: "queue_full", or what `Preparer.prepare` raises.
        """
        return (await self.answer(prompt, client)).prompt

    async def answer(self, work: Work, client: str = "") -> Prepared:
        """What becomes of a piece of work.

        Raises:
            GryphonError: "queue_full", or what `Preparer.answer` raises.
        """
        check_room(client, [job.client for job in self._waiting], "waiting to be prepared")
        is_small = len(msgspec.msgpack.encode(work)) <= _SMALL_BYTES
        job = _Job(client, work.model_path, is_small)
        self._waiting.append(job)
        self._assign()
        try:
            process = await job.process
        except asyncio.CancelledError:
            if job in self._waiting:
                self._waiting.remove(job)
            elif not job.process.cancelled():  # given in the same moment
                self._free(job.process.result())
            raise
        try:
            return await process.preparer.answer(work)
        finally:
            self._free(process)

    async def close(self) -> None:
        """End all processes."""
        processes, self._processes = self._processes, []
        for process in processes:
            await process.preparer.close()
        if self._ending:
            await asyncio.wait(self._ending)

    def _assign(self) -> None:
        """Give waiting jobs to processes, as far as there are."""
        while job := self._next():
            process = self._process_for(job)
            if process is None:
                return
            self._waiting.remove(job)
            self._turns.serve(job.client, {waiting.client for waiting in self._waiting})
            process.is_quick = self._may_be_quick(job) and job.model_path in self._proven
            process.job, process.since_s = job, time.monotonic()
            is_known = process.model_path == job.model_path
            process.quick_s = _QUICK_S if is_known else _QUICK_AT_FIRST_S
            process.model_path = job.model_path
            if job.is_small:
                self._suspects.add(job.model_path)
            job.process.set_result(process)

    def _next(self) -> _Job | None:
        """The next job that may have a process now, were one free."""
        busy = [process for process in self._processes if process.job is not None]
        for_any = sum(not process.is_quick for process in busy) < PROCESSES - 1
        waiting = [job for job in self._waiting if for_any or self._may_be_quick(job)]
        clients = Counter(process.job.client for process in busy if process.job is not None)
        return self._turns.first(waiting, clients) if waiting else None

    def _may_be_quick(self, job: _Job) -> bool:
        return job.is_small and job.model_path not in self._suspects

    def _process_for(self, job: _Job) -> _Process | None:
        idle = [process for process in self._processes if process.job is None]
        if idle:
            return max(idle, key=lambda p: (p.model_path == job.model_path, p.since_s))
        if len(self._processes) >= PROCESSES:
            return None
        if self._processes:
            newest = max(process.since_s for process in self._processes)
            wait_s = newest + _START_AFTER_S - time.monotonic()
            if wait_s > 0:
                asyncio.get_running_loop().call_later(wait_s, self._assign)
                return None
        process = _Process(Preparer(self._time_limit_s))
        self._processes.append(process)
        return process

    def _free(self, process: _Process) -> None:
        now = time.monotonic()
        if process.job is not None and process.job.is_small:
            self._proven.discard(process.model_path)
            if now - process.since_s < process.quick_s:
                self._suspects.discard(process.model_path)
                self._proven.add(process.model_path)
        process.job, process.since_s = None, now
        self._assign()
        asyncio.get_running_loop().call_later(self._idle_s, self._end_idle)

    def _end_idle(self) -> None:
        """End the processes that have been idle for long, but keep one."""
        now = time.monotonic()
        for process in [*self._processes]:
            is_idle = process.job is None and now - process.since_s >= self._idle_s
            if is_idle and len(self._processes) > 1:
                self._processes.remove(process)
                task = asyncio.create_task(process.preparer.close())
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)
