"""Prefill and decode speed of every port and of mlx-lm's, on the same random weights.

    .venv/bin/python scripts/bench_models.py                          # everything, some minutes
    .venv/bin/python scripts/bench_models.py --family gemma2 --size small --pairs 20

Both models live in this process, share weights and BLAS and take turns, each going first every
other time, so that a machine that drifts drifts for both. What is timed is what generating does:

    prefill    511 tokens into the states, then the last token's logits
    decode     greedy steps from there on, each started before the token before it is read

A ratio is mlx-lm's time over ours, more than 1 where ours is faster: the median of the pairs', with
the least and the greatest. Nothing is timed unless the logits of both agree, prompt and steps. XGLM
has no counterpart in mlx-lm and is timed alone; Open-Llama's is Llama, which it is without its own
additions. The status is 1 where logits differ or a ratio misses its goal.

OpenBLAS's threads wait for each other by spinning: figures from a machine that is busy with other
things are noise, so the load is printed with them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

from measurement import append_csv, machine, results_file  # isort: skip  (preloads the BLAS)

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from mlxmodels import registry

PROMPT = 512

# hidden_size is a power of 4: its root is a bfloat16, in which our RecurrentGemma scales embeddings
# and mlx-lm's does not.
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "vocab_size": 2000,
    },
    "large": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "vocab_size": 8000,
    },
}

# Largest difference of logits over their standard deviation.
AGREEMENT = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 5e-1}


@dataclass(frozen=True)
class Family:
    """One port, its counterpart, and the config that both are built from."""

    model_type: str
    counterpart: str | None
    config: dict[str, Any] = field(default_factory=dict)
    goal: dict[str, float] = field(default_factory=lambda: {"prefill": 0.97, "decode": 0.97})
    agreement: float | None = None
    """In place of AGREEMENT, for the reason that `note` gives."""
    note: str = ""


GRIFFIN: dict[str, Any] = {
    "num_key_value_heads": 1,
    "block_types": ["recurrent", "recurrent", "attention"],
    "logits_soft_cap": 30.0,
    "attention_bias": False,
    "conv1d_width": 4,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}
GRIFFIN_GOAL = {"prefill": 0.97, "decode": 1.1}
GRIFFIN_NOTE = "rms_norm_eps is 1e-5, the only one mlx-lm's layers know"

FAMILIES = {
    "gemma": Family(
        *("gemma", "gemma"),
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-6},
        agreement=2e-2,
        note="mlx-lm computes GELU with erf, the checkpoints' is the tanh form",
    ),
    "gemma2": Family(
        *("gemma2", "gemma2"),
        {
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 64,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        note="within the window of 4096; past it mlx-lm errs",
    ),
    "recurrent_gemma": Family(
        *("recurrent_gemma", "recurrent_gemma"),
        GRIFFIN | {"attention_window_size": 2048},
        GRIFFIN_GOAL,
        note=GRIFFIN_NOTE,
    ),
    "recurrent_gemma_full": Family(
        *("recurrent_gemma", "recurrent_gemma"),
        GRIFFIN | {"attention_window_size": 256},
        GRIFFIN_GOAL,
        note=f"a window of 256, full when decoding begins; {GRIFFIN_NOTE}",
    ),
    "nemotron": Family(
        *("nemotron", "nemotron"),
        {"num_key_value_heads": 2, "hidden_act": "relu2", "norm_eps": 1e-5},
    ),
    "open_llama": Family(
        *("open-llama", "llama"),
        {
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "use_stable_embedding": False,
            "shared_input_output_embedding": True,
        },
    ),
    "xglm": Family("xglm", None, note="mlx-lm has none"),
}


class Disagreement(Exception):
    """The two models do not compute the same."""


@dataclass
class Result:
    """One family, size and phase; times are medians of the turns."""

    family: str
    size: str
    dtype: str
    phase: str
    tokens: int
    ours_ms: float
    theirs_ms: float | None = None
    ratio: float | None = None
    least: float | None = None
    greatest: float | None = None
    goal: float | None = None
    difference: float | None = None
    """Largest difference of logits over their standard deviation."""

    @property
    def is_missed(self) -> bool:
        return self.ratio is not None and self.goal is not None and self.ratio < self.goal


def config_of(family: Family, size: dict[str, Any]) -> dict[str, Any]:
    config = size | {"model_type": family.model_type} | family.config
    if family.model_type == "xglm":
        names = {
            "hidden_size": "d_model",
            "intermediate_size": "ffn_dim",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "attention_heads",
        }
        return {names.get(key, key): value for key, value in config.items()}
    if family.model_type == "recurrent_gemma":
        config["intermediate_size"] *= 2  # its MLP is half of it wide
        return config
    return config | {"head_dim": config["hidden_size"] // config["num_attention_heads"]}


def our_model(config: dict[str, Any], dtype: mx.Dtype) -> Any:
    """Our port with random weights under which every part matters."""
    model_class, args_class = registry.model_classes(config)
    model = model_class(args_class.from_dict(config))  # type: ignore[attr-defined]
    mx.random.seed(0)

    def random(name: str, w: mx.array) -> mx.array:
        # Matrices keep the scale of what they multiply; norms, biases and gates stay small.
        spread = w.shape[-1] ** -0.5 if w.ndim > 1 else 0.1
        if "embed_tokens" in name:
            spread = 0.1
        return (mx.random.normal(w.shape) * spread).astype(dtype)

    model.update(tree_map_with_path(random, model.parameters()))
    mx.eval(model.parameters())
    return model


def their_model(counterpart: str, config: dict[str, Any], ours: Any) -> Any:
    """mlx-lm's port with the same arrays as weights."""
    module = import_module(f"mlx_lm.models.{counterpart}")
    model = module.Model(module.ModelArgs.from_dict(config | {"model_type": counterpart}))
    weights = dict(tree_flatten(ours.parameters()))
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    model.load_weights(list(weights.items()))
    return model


def empty_states(model: Any) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


def arrays_of(states: list[Any]) -> list[mx.array]:
    held = (value for state in states for value in state.state)
    return [value for value in held if isinstance(value, mx.array)]


def prefill(model: Any, prompt: mx.array) -> tuple[list[Any], mx.array]:
    """States that have read the prompt, and the token [1] that follows it."""
    states = empty_states(model)
    model(prompt[:, :-1], cache=states)
    mx.eval(arrays_of(states))
    token = mx.argmax(model(prompt[:, -1:], cache=states)[:, -1], axis=-1)
    mx.eval(token)
    return states, token


def decode(model: Any, states: list[Any], token: mx.array, steps: int) -> None:
    """Greedy steps; the next one is under way while the last one's token is read."""
    for _ in range(steps):
        following = mx.argmax(model(token[:, None], cache=states)[:, -1], axis=-1)
        mx.async_eval(following)
        token.item()
        token = following
    mx.eval(token)


def difference(ours: Any, theirs: Any, prompt: mx.array, steps: int = 4) -> float:
    """Largest difference of logits over their standard deviation, prompt and steps."""
    our_states, their_states = empty_states(ours), empty_states(theirs)
    worst = 0.0
    for part in (prompt, *mx.split(prompt[:, :steps], steps, axis=1)):
        got = ours(part, cache=our_states).astype(mx.float32)
        want = theirs(part, cache=their_states).astype(mx.float32)
        worst = max(worst, (mx.abs(got - want).max() / mx.std(want)).item())
    return worst


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    mx.synchronize()
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def turn(model: Any, prompt: mx.array, steps: int) -> dict[str, float]:
    """Seconds of each phase."""
    prefill_s, (states, token) = timed(lambda: prefill(model, prompt))
    decode_s, _ = timed(lambda: decode(model, states, token, steps))
    return {"prefill": prefill_s, "decode": decode_s}


def measure(name: str, size: str, arguments: argparse.Namespace) -> list[Result]:
    """Check that both models agree, let them take turns; the first turn of each is not counted.

    Raises:
        Disagreement: their logits differ.
    """
    family = FAMILIES[name]
    config = config_of(family, SIZES[size])
    ours = our_model(config, getattr(mx, arguments.dtype))
    models = {"ours": ours}
    prompt = mx.random.randint(0, config["vocab_size"], (1, PROMPT), key=mx.random.key(1))
    worst = None
    if family.counterpart is not None:
        models["theirs"] = their_model(family.counterpart, config, ours)
        worst = difference(ours, models["theirs"], prompt)
        bound = max(AGREEMENT[arguments.dtype], family.agreement or 0.0)
        if not worst <= bound:
            raise Disagreement(
                f"{name} {size}: logits differ by {worst:.1e} std, more than {bound:.0e}"
            )
    turns: dict[str, list[dict[str, float]]] = {who: [] for who in models}
    for count in range(arguments.pairs + 1):
        order = list(models) if count % 2 else list(models)[::-1]
        for who in order:
            seconds = turn(models[who], prompt, arguments.decode_tokens)
            if count > 0:
                turns[who].append(seconds)
        print(f"{name} {size}: pair {count} of {arguments.pairs}", file=sys.stderr, end="\r")
    print(file=sys.stderr)

    results = []
    for phase, tokens in (("prefill", PROMPT), ("decode", arguments.decode_tokens)):
        our_times = [seconds[phase] for seconds in turns["ours"]]
        result = Result(
            *(name, size, arguments.dtype, phase, tokens),
            ours_ms=statistics.median(our_times) * 1000,
        )
        if "theirs" in turns:
            their_times = [seconds[phase] for seconds in turns["theirs"]]
            ratios = [b / a for a, b in zip(our_times, their_times, strict=True)]
            result.theirs_ms = statistics.median(their_times) * 1000
            result.ratio = statistics.median(ratios)
            result.least, result.greatest = min(ratios), max(ratios)
            result.goal, result.difference = family.goal[phase], worst
        results.append(result)
    mx.clear_cache()
    return results


def report(results: list[Result], pairs: int) -> str:
    """A Markdown table."""
    host = machine()
    lines = [
        f"{host['machine']}, {host['device']}, {host['blas']}, mlx {host['mlx']}, "
        f"mlx-lm {host['mlx_lm']}, commit {host['commit']}, {pairs} interleaved pairs, "
        f"load {host['load']}",
        "",
        "| family | size | phase | ours tok/s | mlx-lm tok/s | ratio | least | greatest | goal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [result.family, result.size, result.phase, _speed(result.tokens, result.ours_ms)]
        cells.append(_speed(result.tokens, result.theirs_ms))
        cells += [_ratio(result.ratio), _ratio(result.least), _ratio(result.greatest)]
        cells.append(_ratio(result.goal) + (" missed" if result.is_missed else ""))
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name in dict.fromkeys(result.family for result in results):
        worst = max(result.difference or 0.0 for result in results if result.family == name)
        known = [f"logits agree to {worst:.0e} std"] if FAMILIES[name].counterpart else []
        known += [FAMILIES[name].note] if FAMILIES[name].note else []
        lines.append(f"- {name}: {'; '.join(known)}")
    return "\n".join(lines)


def _speed(tokens: int, ms: float | None) -> str:
    return "-" if ms is None else f"{tokens * 1000 / ms:.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    parser.add_argument("--size", choices=SIZES, action="append", help="default: both")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=AGREEMENT, default="float32")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--csv", action="store_true", help="also append to results/")
    arguments = parser.parse_args()
    results: list[Result] = []
    disagreements: list[str] = []
    for name in arguments.family or FAMILIES:
        for size in arguments.size or SIZES:
            try:
                results += measure(name, size, arguments)
            except Disagreement as error:
                disagreements.append(str(error))
    if arguments.json:
        rows = [asdict(result) for result in results]
        print(json.dumps(machine() | {"pairs": arguments.pairs, "results": rows}, indent=2))
    else:
        print(report(results, arguments.pairs))
    if arguments.csv and results:
        path = results_file()
        append_csv(path, [machine() | {"pairs": arguments.pairs} | asdict(r) for r in results])
        print(f"added to {path}", file=sys.stderr)
    for message in disagreements:
        print(message, file=sys.stderr)
    if disagreements or any(result.is_missed for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
