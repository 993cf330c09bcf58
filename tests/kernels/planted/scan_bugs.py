"""Bugs in the chunked scan: a change to its text, what must be reported, and on which line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bug:
    name: str
    kind: str
    old: str
    new: str
    at: str  # in the reported line
    options: dict[str, Any] = field(default_factory=dict)


SCAN_BUGS = [
    Bug(
        "no barrier after the segments' sums",
        "race",
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // every segment has its sums",
        "",
        "decay[s][lane] * before",
    ),
    Bug(
        "a barrier that orders nothing",
        "race",
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // every segment has its sums",
        "threadgroup_barrier(mem_flags::mem_none);",
        "decay[s][lane] * before",
    ),
    Bug(
        "a barrier for the other memory",
        "race",
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // every segment has its sums",
        "threadgroup_barrier(mem_flags::mem_device);",
        "decay[s][lane] * before",
    ),
    Bug(
        "a simdgroup's barrier between simdgroups",
        "race",
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // every segment has its sums",
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
        "decay[s][lane] * before",
    ),
    Bug(
        "carry overwritten while others read it",
        "race",
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // every segment has read the tile's",
        "",
        "carry[lane] = p * before + h",
    ),
    Bug(
        "carry read before its last value is there",
        "race",
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // carry is the last one",
        "",
        "h_last[b * E + e] = carry[lane]",
    ),
    Bug(
        "all segments store the last value",
        "race",
        "if (inside && t < tokens) {\n",
        "if (inside) { h_last[b * E + e] = before; }\n    if (inside && t < tokens) {\n",
        "h_last[b * E + e] = before",
    ),
    Bug(
        "every batch row stores to the first",
        "race-across-threadgroups",
        "y[base + size_t(t) * E] =",
        "y[e + size_t(t) * E] =",
        "y[e + size_t(t) * E]",
    ),
    Bug(
        "load past the last token",
        "out-of-bounds",
        "const bool valid = inside && t < tokens;",
        "const bool valid = inside;",
        "valid ? static_cast<float>(a[",
    ),
    Bug(
        "store past the last token",
        "out-of-bounds",
        "if (inside && t < tokens) {",
        "if (inside) {",
        "y[base + size_t(t) * E]",
    ),
    Bug(
        "idle lanes load",
        "out-of-bounds",
        "inside ? h0[b * E + e] : 0.0f",
        "h0[b * E + e]",
        "carry[lane] = h0[b * E + e]",
    ),
    Bug(
        "load before the buffer",
        "out-of-bounds",
        "static_cast<float>(x[base + size_t(t) * E])",
        "static_cast<float>((x + base)[(t - 1) * E])",
        "(x + base)[(t - 1) * E]",
    ),
    Bug(
        "load a gigabyte away",
        "out-of-bounds",
        "static_cast<float>(x[base + size_t(t) * E])",
        "static_cast<float>(x[base + size_t(t) * E + 268435456])",
        "268435456",
    ),
    Bug(
        "row of a threadgroup array that is not there",
        "local-bounds",
        "decay[seg][lane] = p;",
        "decay[seg + 1][lane] = p;",
        "decay[seg + 1][lane] = p",
    ),
    Bug(
        "column of a threadgroup array that is the next row's",
        "local-bounds",
        "ends[seg][lane] = h;",
        "ends[seg][lane + 1] = h;",
        "ends[seg][lane + 1] = h",
    ),
    Bug(
        "past the end of a private array",
        "local-bounds",
        "values[i] = h;",
        "values[i + 1] = h;",
        "values[i + 1] = h",
    ),
    Bug(
        "carry never initialised",
        "uninitialised",
        "carry[lane] = inside ? h0[b * E + e] : 0.0f;",
        "",
        "float before = carry[lane]",
    ),
    Bug(
        "carry initialised for some lanes",
        "uninitialised",
        "carry[lane] = inside ? h0[b * E + e] : 0.0f;",
        "if (inside) carry[lane] = h0[b * E + e];",
        "float before = carry[lane]",
    ),
    Bug(
        "output added to",
        "uninitialised",
        "y[base + size_t(t) * E] = static_cast<T>",
        "y[base + size_t(t) * E] += static_cast<T>",
        "y[base + size_t(t) * E] +=",
    ),
    Bug(
        "last token not written",
        "unwritten-output",
        "if (inside && t < tokens) {",
        "if (inside && t < tokens - 1) {",
        "",
    ),
    Bug(
        "one output forgotten for a batch row",
        "unwritten-output",
        "if (seg == 0 && inside) {",
        "if (seg == 0 && inside && b == 0) {",
        "",
    ),
    Bug(
        "idle lanes return early",
        "return-before-barrier",
        "if (seg == 0) {\n",
        "if (!inside) return;\nif (seg == 0) {\n",
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
    ),
    Bug(
        "barrier for some segments only",
        "barrier-divergence",
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // every segment has its sums",
        "if (seg > 0) { threadgroup_barrier(mem_flags::mem_threadgroup); }",
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
    ),
    Bug(
        "segments leave the loop at different times",
        "barrier-divergence",
        "start < tokens; start += SEG * L",
        "start + int(seg) * L < tokens; start += SEG * L",
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
    ),
    Bug(
        "store to an input",
        "write-to-input",
        "h = at * h + xt;",
        "h = at * h + xt;\n    if (valid) ((device T*)x)[base + size_t(t) * E] = x[base];",
        "((device T*)x)",
    ),
    Bug(
        "too much threadgroup memory",
        "threadgroup-memory",
        "threadgroup float carry[32];",
        "threadgroup float carry[32];\nthreadgroup float table[8000];\n"
        "if (thread_position_in_grid.x > 100000) table[0] = 0.0f;",
        "table[8000]",
    ),
    Bug(
        "32-bit index",
        "integer-overflow",
        "const size_t base = size_t(b) * tokens * E + e;",
        "const int wide = (int(b) + 60000) * 40000;\n"
        "const size_t base = size_t(b) * tokens * E + e + (wide == 12345 ? 1 : 0);",
        "40000",
    ),
    Bug(
        "shift by the width",
        "shift",
        "p *= at;",
        "p *= at * float(1 << (32 + i));",
        "1 << (32 + i)",
    ),
    Bug(
        "division by zero",
        "division-by-zero",
        "const bool inside = e < E;",
        "const bool inside = e < E + (tokens - tokens) && 7 / (int(e) - int(e)) != 1;",
        "const bool inside",
    ),
    Bug(
        "a loop without an end",
        "runaway",
        "start += SEG * L) {",
        "start += 0) {",
        "",
        options={"step_limit": 200000},
    ),
]
