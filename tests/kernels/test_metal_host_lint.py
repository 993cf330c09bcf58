"""What Metal's compiler refuses and C++ does not, the host refuses too; and nothing else."""

from __future__ import annotations

import mlx.core as mx
import pytest

from .. import metal_host
from ..metal_host import capture, lint
from .planted.kernels import CHUNKED_SCAN, Scan, Small, run
from .planted.snippets import COMPILER, ILLEGAL, LEGAL, Snippet, body


def kernel(snippet: Snippet) -> Small:
    return Small(
        snippet.body,
        snippet.header,
        inputs=lambda: [mx.arange(64, dtype=mx.float32), mx.array([1.0, 2.0])],
        input_names=["x", "few"],
    )


def lint_alone(snippet: Snippet) -> list[str]:
    """Without compiling: the launch as MLX generates it, held against the rules."""
    small = kernel(snippet)
    made = mx.fast.metal_kernel("small", ["x", "few"], ["y"], snippet.body, snippet.header)
    options = {
        "grid": small.grid,
        "threadgroup": small.threadgroup,
        "output_shapes": list(small.output_shapes),
        "output_dtypes": list(small.output_dtypes),
    }
    launch = capture.trace("small", made, list(small.inputs()), options)
    return [str(finding) for finding in lint.check(launch)]


@pytest.mark.parametrize("snippet", ILLEGAL, ids=lambda snippet: snippet.name.replace(" ", "-"))
def test_what_metal_lacks_is_refused(snippet: Snippet) -> None:
    found = lint_alone(snippet)
    assert any(snippet.says in message for message in found), found


@pytest.mark.parametrize("snippet", LEGAL, ids=lambda snippet: snippet.name.replace(" ", "-"))
def test_what_metal_has_is_not_refused(snippet: Snippet) -> None:
    assert lint_alone(snippet) == []
    _, host = run(kernel(snippet), schedules=["forward"])  # compiles
    assert "lint" not in host.kinds


@pytest.mark.parametrize("snippet", COMPILER, ids=lambda snippet: snippet.name.replace(" ", "-"))
def test_what_the_shim_lacks_does_not_compile(snippet: Snippet) -> None:
    with pytest.raises(metal_host.CompileError) as error:
        run(kernel(snippet))
    assert snippet.says in str(error.value).lower() or snippet.says in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "threadgroup float t[4] = {1.0f};",
        "#define BUFFER threadgroup float t[4];\nBUFFER",
        "static threadgroup float t[4];",
    ],
)
def test_a_threadgroup_declaration_that_is_not_plain_is_refused(text: str) -> None:
    with pytest.raises(metal_host.TranslationError):
        run(kernel(body("declaration", text, "")))


def test_more_than_31_buffers() -> None:
    names = [f"in{n}" for n in range(31)]
    small = Small(
        "y[0] = " + " + ".join(f"{name}[0]" for name in names) + ";",
        input_names=names,
        inputs=lambda: [mx.array([1.0])] * 31,
        output_shapes=[(1,)],
        grid=(1, 1, 1),
    )
    _, host = run(small)
    assert [f.message for f in host.findings] == ["32 buffers, Metal has 31 slots"]


def test_the_real_kernel_passes_the_lint() -> None:
    _, host = run(Scan.random(1, 3, 2))
    assert "lint" not in host.kinds
    assert CHUNKED_SCAN.count("threadgroup float") == 3
