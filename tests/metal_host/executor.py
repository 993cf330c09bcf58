"""Runs a compiled kernel over buffers, through the runtime's C interface."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import compiler
from .buffers import Buffer
from .capture import Launch
from .findings import (
    CRASH,
    DIVISION,
    KINDS,
    RUNAWAY,
    THREADGROUP_MEMORY,
    THREADS,
    UNWRITTEN,
    Finding,
    Report,
)
from .runtime_abi import BufferArgument, Declaration, DlInfo, LaunchArguments, RawFinding
from .translate import Unit

_one_at_a_time = threading.Lock()  # the runtime's checks are about one launch
SCHEDULES = ("forward", "reverse", "random")
THREADGROUP_LIMIT = 32 * 1024
THREAD_LIMIT = 1024
_FIRST_THREADGROUP_REGION = 96


@dataclass(frozen=True)
class Options:
    """How to run a launch."""

    check: bool = True
    schedules: Sequence[str] = ("forward", "reverse")
    seed: int = 1
    workers: int = 2  # operating-system threads without checks; with them there is one
    step_limit: int = 400_000_000  # loads and stores, then the kernel counts as endless


def execute(
    launch: Launch, unit: Unit, buffers: list[Buffer], schedule: str, options: Options
) -> Report:
    """Runs every threadgroup; the outputs' bytes are then in their buffers."""
    library_path = compiler.build_kernel(unit.source, check=options.check)
    return _Run(launch, unit, buffers, library_path).run(schedule, options)


class _Run:
    def __init__(
        self, launch: Launch, unit: Unit, buffers: list[Buffer], library_path: Path
    ) -> None:
        self._launch, self._unit, self._buffers = launch, unit, buffers
        self._path = library_path
        self._library = compiler.load(library_path)
        self._runtime = compiler.load(compiler.build_runtime())
        self._entry = ctypes.cast(self._library.mh_entry, ctypes.c_void_p)
        self._image = self._load_address()
        self._granules: dict[int, int] = {}

    def run(self, schedule: str, options: Options) -> Report:
        grid = self._launch.grid
        x, y, z = self._launch.threadgroup  # before it is cut to the grid, as MLX compares it
        threadgroup = (min(x, grid[0]), min(y, grid[1]), min(z, grid[2]))
        report = Report(self._launch.name, schedule, grid, threadgroup)
        if min(*grid, x, y, z) < 1:
            raise ValueError(f"[metal_host] grid {grid} by threadgroup {x, y, z} is empty.")
        if x * y * z > THREAD_LIMIT:
            message = f"{x} x {y} x {z} threads in a threadgroup, the limit is {THREAD_LIMIT}"
            report.add(Finding(THREADS, message))
            return report  # MLX would raise
        arguments = (BufferArgument * len(self._buffers))(*map(_argument, self._buffers))
        self._library.mh_declarations.restype = ctypes.c_void_p
        call = LaunchArguments(
            entry=self._entry.value,
            declarations=self._library.mh_declarations(),
            image=self._image,
            buffers=arguments,
            buffer_count=len(self._buffers),
            grid=grid,
            threadgroup=threadgroup,
            schedule=SCHEDULES.index(schedule),
            check=options.check,
            workers=1 if options.check else options.workers,
            seed=options.seed,
            step_limit=options.step_limit,
        )
        self._granules = self._check_threadgroup_memory(call, report)
        with _one_at_a_time:
            self._runtime.mh_run(ctypes.byref(call))
            found = self._read_findings() if options.check else []
        report.threadgroups, report.barriers = call.threadgroups, call.barriers
        report.collectives = call.collectives
        self._collect(found, report)
        if call.faulted:
            chains = compiler.resolve(self._path, [max(call.fault_pc - self._image, 0)])
            file, line = self._place(chains[0])
            if call.faulted == signal.SIGFPE:
                report.add(self._finding(DIVISION, "integer division by zero", file, line, 0))
            else:
                message = f"access to address {call.fault_address:#x}, outside every buffer"
                if call.stack_overflow:
                    message = "a thread has more than 120 KiB of private memory"
                report.add(self._finding(CRASH, message, file, line, 0))
        if call.ran_away:
            message = f"stopped after {options.step_limit} loads and stores"
            report.add(Finding(RUNAWAY, message))
        for buffer, argument in zip(self._buffers, arguments, strict=True):
            report.bytes_read[buffer.name] = argument.read
            report.bytes_written[buffer.name] = argument.written
            if argument.unwritten and not (call.faulted or call.ran_away):
                count = argument.unwritten // buffer.element
                first = buffer.place(argument.first_unwritten)
                message = f"{count} elements were never written, the first is {first}"
                report.add(Finding(UNWRITTEN, message))
        return report

    def _check_threadgroup_memory(self, call: LaunchArguments, report: Report) -> dict[int, int]:
        """Reports too much of it; the bytes of one scalar for each array."""
        declaration = ctypes.cast(call.declarations, ctypes.POINTER(Declaration))
        sizes, granules = {}, {}
        while declaration:
            sizes[declaration.contents.id] = declaration.contents.bytes
            granules[declaration.contents.id] = declaration.contents.granule
            declaration = declaration.contents.next
        report.threadgroup_bytes = sum((size + 15) // 16 * 16 for size in sizes.values())
        if report.threadgroup_bytes <= THREADGROUP_LIMIT:
            return granules
        names = ", ".join(f"{self._unit.arrays[id].name} {size}" for id, size in sizes.items())
        largest = self._unit.arrays[max(sizes, key=lambda id: sizes[id])]
        file = self._unit.header_file if largest.is_in_header else self._unit.body_file
        message = f"{report.threadgroup_bytes} bytes, the limit is {THREADGROUP_LIMIT} ({names})"
        report.add(self._finding(THREADGROUP_MEMORY, message, file, largest.line, 0))
        return granules

    def _read_findings(self) -> list[RawFinding]:
        found = ctypes.POINTER(RawFinding)()
        count = self._runtime.mh_findings(ctypes.byref(found))
        return [RawFinding.from_buffer_copy(found[i]) for i in range(count)]

    def _collect(self, raw: list[RawFinding], report: Report) -> None:
        addresses = [address for f in raw for address in (f.pc, f.other_pc) if address]
        # A return address is the instruction after the call.
        offsets = [address - self._image - 1 for address in addresses]
        chains = compiler.resolve(self._path, offsets)
        places = {a: self._place(chain) for a, chain in zip(addresses, chains, strict=True)}
        seen: set[tuple[str, str, int, int]] = set()
        for f in raw:
            kind = KINDS[f.kind]
            file, line = places.get(f.pc, ("", 0))
            _, other_line = places.get(f.other_pc, ("", 0))
            message = self._message(kind, f, other_line)
            key = (kind, file, line, other_line)
            if key not in seen:
                seen.add(key)
                report.add(self._finding(kind, message, file, line, other_line))

    def _message(self, kind: str, f: RawFinding, other_line: int) -> str:
        thread = f"thread {f.thread} of threadgroup {f.group}"
        other = f"thread {f.other_thread}"
        if f.other_group != f.group:
            other += f" of threadgroup {f.other_group}"
        other += f" at line {other_line}" if other_line else ""
        verb = "stored" if f.is_write else "loaded"
        earlier = "stored" if f.other_is_write else "loaded"
        place = self._element(f)
        times = f" ({f.count} times)" if f.count > 1 else ""
        messages = {
            "out-of-bounds": f"{verb} {place} by {thread}",
            "uninitialised": f"loaded {place}, which nobody has written, by {thread}",
            "write-to-input": f"stored to the input {place} by {thread}",
            "misaligned": f"{place} is not at a multiple of {f.bytes} bytes, by {thread}",
            "same-value": f"{place} {verb} by {thread}, and the same value by {other}",
            "barrier-divergence": f"{thread} waits here, {other} waits elsewhere",
            "return-before-barrier": f"{thread} waits here, thread {f.other_thread} has returned",
            "simd-divergence": f"{thread} came here, {other} of its simdgroup is elsewhere",
            "inactive-lane": f"the value of a lane that did not come here, by {thread}",
            "local-bounds": f"index outside an array, by {thread}",
            "shift": f"shift by a negative or too large number of bits, by {thread}",
            "integer-overflow": f"signed integer overflow, by {thread}",
            "division-by-zero": f"integer division by zero, by {thread}",
        }
        race = f"{place} {verb} by {thread}, {earlier} by {other}, and no barrier between them"
        return f"{messages.get(kind, race)}{times}"

    def _element(self, f: RawFinding) -> str:
        if f.region < 0:
            return "?"
        if f.region < _FIRST_THREADGROUP_REGION:
            return str(self._buffers[f.region].place(int(f.offset)))
        id = f.region - _FIRST_THREADGROUP_REGION
        return f"threadgroup {self._unit.arrays[id].name}[{f.offset // self._granules[id]}]"

    def _place(self, chain: list[tuple[str, int]]) -> tuple[str, int]:
        own = (self._unit.body_file, self._unit.header_file)
        return next((place for place in chain if place[0] in own), ("", 0))

    def _finding(self, kind: str, message: str, file: str, line: int, other_line: int) -> Finding:
        source = self._launch.header if file == self._unit.header_file else self._launch.body
        lines = source.split("\n")
        text = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        return Finding(kind, message, file, line, other_line, text)

    def _load_address(self) -> int:
        info = DlInfo()
        dladdr = ctypes.CDLL(None).dladdr
        dladdr(self._entry, ctypes.byref(info))
        return int(info.base or 0)


def _argument(buffer: Buffer) -> BufferArgument:
    present = buffer.present.ctypes.data if buffer.present is not None else None
    return BufferArgument(
        data=buffer.data.ctypes.data,
        bytes=buffer.data.size,
        element=buffer.element,
        residue=buffer.residue,
        is_output=buffer.is_output,
        initialised=buffer.initialised,
        present=present,
    )
