"""Prefill and decode speed of Gryphon's engine and of mlx-lm on the same weights, in one run.

    .venv/bin/python scripts/bench_generate.py                 # the embedded model
    .venv/bin/python scripts/bench_generate.py --pairs 10

The contenders, each in a process of its own, take turns, so that a machine that drifts drifts for
all of them:

    gryphon            the whole stack below a face: client, socket, engine, our port
    mlx-lm             as it installs, weights as stored; on a CPU 16-bit arithmetic is emulated, so
                       it gets a short task there
    mlx-lm float32     as it installs, weights expanded to float32
    mlx-lm matched     float32 weights and gryphon's BLAS, so that what is left is the code

The answer is greedy and forced to its full length. Figures are medians; a ratio is the median of
the ratios of neighbouring turns. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CONTENDERS = ("gryphon", "mlx-lm", "mlx-lm float32", "mlx-lm matched")
SHORT = (8, 4)


def prompt_tokens(count: int, vocab_size: int) -> list[int]:
    """The same arbitrary ids for every contender; none of them is a special token."""
    return [1000 + (i * 7919) % (vocab_size - 2000) for i in range(count)]


async def run_gryphon(path: Path, prompt: list[int], length: int) -> None:
    """Answer each line on standard input with one measurement."""
    from app.engine.client import EngineClient
    from app.engine.protocol import Failed, Finished, GenerationRequest, ModelRef, Sampling

    client = EngineClient()
    for turn, _ in enumerate(sys.stdin):
        request = GenerationRequest(
            id=str(turn),
            model=ModelRef(path.name, str(path)),
            prompt_tokens=prompt,
            sampling=Sampling(temperature=0),
            max_tokens=length,
        )
        async for event in client.stream(request):
            if isinstance(event, Failed):
                sys.exit(event.message)
            if isinstance(event, Finished):
                usage, timings = event.usage, event.timings
                assert usage.completion_tokens == length, event
                answer(timings.prefill_tps(usage), timings.decode_tps(usage))
    await client.close()


def run_mlx_lm(path: Path, prompt: list[int], length: int, contender: str) -> None:
    """The same for mlx-lm; its llama port reads the weights once their family is renamed."""
    if contender == "mlx-lm matched":
        from app.engine import blas

        blas.preload()
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.utils import dequantize_model, load_model
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for file in path.iterdir():
            if file.is_file() and file.name != "config.json":
                (copy / file.name).symlink_to(file)
        config = json.loads((path / "config.json").read_text())
        config |= {"model_type": "llama", "tie_word_embeddings": True}
        (copy / "config.json").write_text(json.dumps(config))
        model, _ = load_model(copy)
        tokenizer = TokenizerWrapper(AutoTokenizer.from_pretrained(copy), eos_token_ids=set())
    if contender != "mlx-lm":
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    elif mx.default_device() == mx.Device(mx.DeviceType.cpu):
        prompt, length = prompt[: SHORT[0]], SHORT[1]
    for _ in sys.stdin:
        *_, last = stream_generate(model, tokenizer, prompt, max_tokens=length)
        answer(last.prompt_tps, last.generation_tps)


def answer(prefill_tps: float, decode_tps: float) -> None:
    print(json.dumps([prefill_tps, decode_tps]), flush=True)


def measure(path: Path, arguments: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Let the contenders take turns; the first turn of each warms up and is not counted."""
    command = [sys.executable, __file__, "--model", str(path)]
    command += ["--prompt-tokens", str(arguments.prompt_tokens)]
    command += ["--decode-tokens", str(arguments.decode_tokens)]
    workers = {
        name: subprocess.Popen(
            [*command, "--contender", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name in CONTENDERS
    }
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    for turn in range(arguments.pairs + 1):
        for name, worker in workers.items():
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                sys.exit(f"{name} ended without an answer")
            if turn > 0:
                prefill, decode = json.loads(line)
                turns[name].append((prefill, decode))
            print(f"turn {turn} of {arguments.pairs}: {name} {line.strip()}", file=sys.stderr)
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    return turns


def report(turns: dict[str, list[tuple[float, float]]], arguments: argparse.Namespace) -> str:
    """A Markdown table of medians and of ratios to gryphon's neighbouring turn."""
    from importlib.metadata import version

    lines = [
        f"{arguments.prompt_tokens} prompt tokens, {arguments.decode_tokens} decoded, "
        f"{arguments.pairs} interleaved turns, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "",
        "| | prefill tok/s | decode tok/s | gryphon's prefill | gryphon's decode |",
        "|---|---|---|---|---|",
    ]
    for name, figures in turns.items():
        cells = [f"{statistics.median(figure[i] for figure in figures):.1f}" for i in (0, 1)]
        for i in (0, 1):
            pairs = zip(turns["gryphon"], figures, strict=True)
            ratio = statistics.median(ours[i] / theirs[i] for ours, theirs in pairs)
            cells.append("1" if name == "gryphon" else f"{ratio:.2f}×")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="an installed model of the open-llama family")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--decode-tokens", type=int, default=48)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from app.library.installed import find_model

    model = find_model(arguments.model, allow_path=True)
    config = json.loads((model.path / "config.json").read_text())
    prompt = prompt_tokens(arguments.prompt_tokens, config["vocab_size"])
    if arguments.contender == "gryphon":
        asyncio.run(run_gryphon(model.path, prompt, arguments.decode_tokens))
    elif arguments.contender:
        run_mlx_lm(model.path, prompt, arguments.decode_tokens, arguments.contender)
    else:
        print(report(measure(model.path, arguments), arguments))


if __name__ == "__main__":
    main()
