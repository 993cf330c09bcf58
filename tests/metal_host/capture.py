"""What MLX would compile and dispatch for one call of a custom kernel, from MLX's own generator.

Exporting a function traces it, and tracing a custom kernel generates its Metal source: also where
there is no Metal. Nothing of MLX's generator is imitated here, so the host follows its upgrades.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

Size = tuple[int, int, int]
Kernel = Callable[..., list[mx.array]]

_BUFFER = re.compile(
    r"(?P<const>const )?(?P<space>device|constant) (?P<type>[\w<>]+)(?P<mark>[*&]) (?P<name>\w+) "
    r"\[\[buffer\((?P<index>\d+)\)\]\]"
)
_ATTRIBUTE = re.compile(r"(?P<type>\w+) (?P<name>\w+) \[\[(?P<attribute>\w+)\]\]")


@dataclass(frozen=True)
class Parameter:
    """A parameter of the kernel as MLX wrote it."""

    name: str
    type: str
    space: str  # "device", "constant", or "" for a thread attribute
    is_reference: bool
    is_const: bool


@dataclass(frozen=True)
class Launch:
    """One dispatch: the text and everything that MLX decided about it."""

    name: str
    text: str
    header: str
    body: str
    template: str  # the line "template <...>", or ""
    function: str
    arguments: str  # "<float, 3>", or ""
    parameters: tuple[Parameter, ...]
    grid: Size
    threadgroup: Size
    ensure_row_contiguous: bool

    @property
    def signature(self) -> str:
        parameters = ", ".join(
            f"{'const ' * p.is_const}{p.space} {p.type}{'&' if p.is_reference else '*'} {p.name}"
            if p.space
            else f"{p.type} {p.name}"
            for p in self.parameters
        )
        return f"void {self.function}({parameters})"


def trace(name: str, kernel: Kernel, inputs: Sequence[mx.array], options: dict[str, Any]) -> Launch:
    """The launch that this call would make.

    Raises:
        What MLX raises for the same call; RuntimeError if its export no longer looks as we know it.
    """
    primitives: list[dict[str, Any]] = []

    def note(event: dict[str, Any]) -> None:
        if event["type"] == "primitive":
            primitives.append(event)

    def call(*arrays: mx.array) -> list[mx.array]:
        return kernel(inputs=list(arrays), **options)

    mx.export_function(note, call, *inputs)
    if [event["name"] for event in primitives] != ["CustomKernel"]:
        raise RuntimeError(f"[metal_host] expected one CustomKernel, traced {primitives}.")
    function, text, *rest = primitives[0]["arguments"]
    gx, gy, gz, tx, ty, tz, _infos, ensure_row_contiguous, *_ = rest
    head = re.search(
        rf"(?P<template>template <[^\n]*>\n)?"
        rf"\[\[kernel\]\] void {function}\(\n(?P<parameters>.*?)\) \{{\n",
        text,
        re.DOTALL,
    )
    if head is None or not isinstance(ensure_row_contiguous, bool):
        raise RuntimeError(f"[metal_host] MLX's generated text has another shape now:\n{text}")
    instance = re.search(rf"\[\[kernel\]\] decltype\({function}(<.*>)\) ", text)
    tail = text.find("\ntemplate [[host_name", head.end()) if instance else len(text)
    body = text[head.end() : tail].rstrip()
    if not body.endswith("}"):
        raise RuntimeError(f"[metal_host] MLX's generated text has another end now:\n{text}")
    return Launch(
        name=name,
        text=text,
        header=text[: head.start()],
        body=body[:-1],
        template=(head["template"] or "").strip(),
        function=function,
        arguments=instance[1] if instance else "",
        parameters=tuple(_parameters(head["parameters"])),
        grid=(gx, gy, gz),
        threadgroup=(tx, ty, tz),
        ensure_row_contiguous=ensure_row_contiguous,
    )


def _parameters(text: str) -> list[Parameter]:
    found = []
    for line in text.split(",\n"):
        if buffer := _BUFFER.fullmatch(line.strip()):
            found.append(
                Parameter(
                    name=buffer["name"],
                    type=buffer["type"],
                    space=buffer["space"],
                    is_reference=buffer["mark"] == "&",
                    is_const=buffer["const"] is not None,
                )
            )
        elif attribute := _ATTRIBUTE.fullmatch(line.strip()):
            found.append(Parameter(attribute["name"], attribute["type"], "", False, False))
        else:
            raise RuntimeError(f"[metal_host] a parameter that is new to us: {line.strip()!r}.")
    return found
