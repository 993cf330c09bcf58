"""Computes one family's goldens; scripts/make_golden.py starts it in that family's environment."""

import copy
import json
import logging
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from golden_variants import (
    ABSENT,
    BASE,
    FAMILIES,
    HEADS,
    NO_EFFECT,
    NOT_COVERED,
    VARIANTS,
    Variant,
)
from safetensors.torch import save

IS_5 = int(transformers.__version__.split(".")[0]) >= 5

Tensors = dict[str, torch.Tensor]
Case = tuple[Tensors, Tensors]

FIELDS = ("loss", "logits", "start_logits", "end_logits", "last_hidden_state")
LAYERED_FIELDS = ("hidden_states", "attentions")

# Norm weights that are stored as w and used as 1 + w.
ZERO_CENTRED = ("recurrent_gemma", "gemma", "gemma2", "nemotron")

SHORT = 24
LENGTHS = (SHORT, 1, 9, 17)
DOCUMENTS = (9, 1, 14)


def main(family: str, output: Path) -> None:
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(f"{family}: torch {torch.__version__}, transformers {transformers.__version__}")
    references = [
        Reference(name, family, variant)
        for name, variant in VARIANTS.items()
        if name.startswith(f"{family}_")
    ]
    require_every_field(references)
    with torch.no_grad():
        for reference in references:
            write(reference, output)


def require_every_field(references: "Sequence[Reference]") -> None:
    """Stop if a field of the family's config class has its default in every variant."""
    defaults = as_saved(type(references[0].config)())
    varied = {
        key
        for reference in references
        for key, value in as_saved(reference.config).items()
        if value != defaults.get(key)
    }
    if missing := defaults.keys() - varied - NO_EFFECT - NOT_COVERED:
        raise SystemExit(f"{references[0].family}: no variant changes {', '.join(sorted(missing))}")


def write(reference: "Reference", output: Path) -> None:
    """NAME.json and NAME.safetensors of one variant."""
    name, variant = reference.name, reference.variant
    tensors = {f"weights.{key}": value for key, value in reference.weights.items()}
    for case in variant.cases:
        inputs, outputs = CASES[case](reference, Draw(reference, case))
        tensors |= {f"case.{case}.in.{key}": value for key, value in inputs.items()}
        tensors |= {f"case.{case}.out.{key}": value for key, value in outputs.items()}
    if variant.dtype != "float32":
        ids = tensors["case.whole.in.input_ids"]
        tensors["reference_logits"] = reference.run(reference.dtype, input_ids=ids)["logits"]
    metadata = {
        "dtype": variant.dtype,
        "reference": f"transformers {transformers.__version__} {reference.class_name}",
        "task": variant.task,
        "torch": torch.__version__,
    }
    data = pack(tensors, metadata)
    (output / f"{name}.safetensors").write_bytes(data)
    text = json.dumps(reference.saved_config(), indent=2, sort_keys=True) + "\n"
    (output / f"{name}.json").write_text(text)
    result = next(value for key, value in tensors.items() if key.startswith("case.whole.out."))
    print(f"  {name}: root mean square {result.square().mean().sqrt():.2f}, {len(data):,} bytes")


def pack(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    """A safetensors file, the same bytes every time: the library writes metadata in any order."""
    tensors = {key: small(value) for key, value in tensors.items()}
    data = save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    return data[:8] + text.ljust(end - 8) + data[end:]


def small(value: torch.Tensor) -> torch.Tensor:
    """A copy of its own memory, with 32 bits for integers."""
    dtype = torch.int32 if value.dtype == torch.int64 else value.dtype
    return value.to(dtype, copy=True, memory_format=torch.contiguous_format)


class Reference:
    """A variant's reference model, its weights such that every part of it matters."""

    def __init__(self, name: str, family: str, variant: Variant) -> None:
        self.name = name
        self.family = family
        self.variant = variant
        prefix = variant.reference or FAMILIES[family]
        self.class_name = prefix + HEADS[variant.task]
        self.model_class = getattr(transformers, self.class_name)
        config_class = getattr(transformers, f"{prefix}Config")
        self.config = config_class(**BASE[family] | variant.config, attn_implementation="eager")
        self.dtype: torch.dtype = getattr(torch, variant.dtype)
        self.weights = {key: value.to(self.dtype) for key, value in self.random_weights().items()}

    def random_weights(self) -> Tensors:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

        def normal(value: torch.Tensor, scale: float) -> torch.Tensor:
            return torch.randn(value.shape, generator=generator) * scale

        weights = {}
        for key, value in sorted(self.model_class(self.config).named_parameters()):
            if key.endswith("recurrent_param"):  # decays from 0.01 to 0.99
                weights[key] = torch.rand(value.shape, generator=generator) * 5.0 - 4.5
            elif key.endswith("norm.weight"):
                weights[key] = normal(value, 0.3) + (self.family not in ZERO_CENTRED)
            elif value.ndim == 1 or key.endswith("gate_bias") or "embed_tokens" in key:
                weights[key] = normal(value, 0.3)
            else:
                fan_in = value.shape[-2] if key.endswith("gate_weight") else value[0].numel()
                weights[key] = normal(value, 1.3 * fan_in**-0.5)
        return weights

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """A model that computes in dtype; a new one each time, for some keep state on modules."""
        torch.set_default_dtype(dtype)
        model = self.model_class(copy.deepcopy(self.config)).eval()
        torch.set_default_dtype(torch.float32)
        if getattr(self.config, "use_bidirectional_attention", False):
            # Eager attention does not know the documented flag, only the one behind it.
            model.config.is_causal = False
        for key, value in model.named_parameters():
            value.copy_(self.weights[key])
        return model

    def run(self, dtype: torch.dtype = torch.float32, **inputs: Any) -> Tensors:
        """Every output of one forward call without a cache."""
        out = self.model(dtype)(**inputs, use_cache=False)
        outputs = {name: out[name].float() for name in FIELDS if out.get(name) is not None}
        for name in LAYERED_FIELDS:
            layers = out.get(name) or ()
            outputs |= {f"{name}.{i}": layer.float() for i, layer in enumerate(layers)}
        return outputs

    def saved_config(self) -> dict[str, Any]:
        """config.json as a checkpoint holds it."""
        config = as_saved(self.config)
        config["architectures"] = [FAMILIES[self.family] + HEADS[self.variant.task]]
        config["dtype"] = self.variant.dtype
        if self.variant.classic or not IS_5:
            config = classic(config)
        config |= self.variant.saved
        return {key: value for key, value in config.items() if value is not ABSENT}


def as_saved(config: Any) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads(config.to_json_string())
    return saved


def classic(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 4 spells it."""
    config = dict(config)
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters", {})
    config |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    if "block_types" in config:
        config["_block_types"] = config.pop("block_types")
    config.pop("layer_types", None)  # came later; what it says by default was the rule
    return config


class Draw:
    """Random inputs of one case."""

    def __init__(self, reference: Reference, case: str) -> None:
        config = reference.config
        seed = zlib.crc32(f"{reference.name}.{case}".encode())
        self.generator = torch.Generator().manual_seed(seed)
        self.vocab_size: int = config.vocab_size
        self.pad: int = config.pad_token_id or 0
        # What classifies a sequence pools at its last id that is not padding.
        self.only_as_padding = reference.variant.task == "sequence-classification"

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def ids(self, rows: int, length: int) -> torch.Tensor:
        if not self.only_as_padding:
            return self.integers(self.vocab_size, rows, length)
        ids = self.integers(self.vocab_size - 1, rows, length)
        return ids + (ids >= self.pad)

    def labels(self, high: int, *shape: int) -> torch.Tensor:
        """Integers below high; about a third are -100, which no loss counts."""
        labels = self.integers(high, *shape)
        return labels.masked_fill(self.integers(3, *shape) == 0, -100)


def whole(reference: Reference, draw: Draw) -> Case:
    ids = draw.ids(1, reference.variant.tokens)
    return {"input_ids": ids}, reference.run(input_ids=ids)


def decode(reference: Reference, draw: Draw) -> Case:
    """A cached prefill, then one token at a time."""
    model, length = reference.model(), reference.variant.tokens
    ids = draw.ids(1, length)
    # transformers 4 returns a cache; 5 writes into the one that it is given.
    cache = transformers.DynamicCache(config=model.config) if IS_5 else None
    pieces = []
    edges = [0, *range(reference.variant.prefill, length + 1)]
    for begin, end in zip(edges, edges[1:], strict=False):
        out = model(
            ids[:, begin:end],
            position_ids=torch.arange(begin, end)[None],
            use_cache=True,
            past_key_values=cache,
        )
        cache = cache if IS_5 else out.past_key_values
        pieces.append(out.logits)
    return {"input_ids": ids}, {"logits": torch.cat(pieces, dim=1)}


def prefixes(reference: Reference, draw: Draw) -> Case:
    """The last logits of one forward call per prefix."""
    ids = draw.ids(1, reference.variant.tokens)
    last = [
        reference.run(input_ids=ids[:, :n])["logits"][:, -1] for n in range(1, ids.shape[1] + 1)
    ]
    return {"input_ids": ids}, {"logits": torch.stack(last, dim=1)}


def hidden(reference: Reference, draw: Draw) -> Case:
    ids = draw.ids(1, SHORT)
    return {"input_ids": ids}, reference.run(input_ids=ids, output_hidden_states=True)


def attentions(reference: Reference, draw: Draw) -> Case:
    ids = draw.ids(1, 20)
    outputs = reference.run(input_ids=ids, output_attentions=True)
    return {"input_ids": ids}, {k: v for k, v in outputs.items() if k.startswith("attentions.")}


def embeds(reference: Reference, draw: Draw) -> Case:
    inputs = {"inputs_embeds": draw.normal(1, SHORT, reference.config.hidden_size)}
    return inputs, reference.run(**inputs)


def positions(reference: Reference, draw: Draw) -> Case:
    """Positions with gaps; a mask of ones says that these are not documents."""
    # Open-Llama has no position past the number of tokens: there every one occurs twice.
    steps = torch.arange(SHORT)
    steps = steps // 2 if reference.family == "open_llama" else steps * 2
    inputs = {
        "input_ids": draw.ids(1, SHORT),
        "attention_mask": torch.ones(1, SHORT, dtype=torch.int64),
        "position_ids": steps[None] + 3,
    }
    return inputs, reference.run(**inputs)


def packed(reference: Reference, draw: Draw) -> Case:
    """Documents in one row, each computed alone: not every reference tells them apart."""
    documents = [draw.ids(1, n) for n in DOCUMENTS]
    inputs = {
        "input_ids": torch.cat(documents, dim=1),
        "position_ids": torch.cat([torch.arange(n) for n in DOCUMENTS])[None],
    }
    alone = [reference.run(input_ids=ids)["logits"] for ids in documents]
    return inputs, {"logits": torch.cat(alone, dim=1)}


def padded(begins: Sequence[int]) -> Callable[[Reference, Draw], Case]:
    """Rows of several lengths, padded in front to `begins`; each of them computed alone."""

    def case(reference: Reference, draw: Draw) -> Case:
        rows = [draw.ids(1, n) for n in LENGTHS]
        alone = [reference.run(input_ids=ids) for ids in rows]
        inputs = {
            "input_ids": place(rows, begins, draw.pad),
            "attention_mask": place([torch.ones_like(ids) for ids in rows], begins, 0),
        }
        has_time = reference.variant.task != "sequence-classification"
        outputs = {}
        for name in alone[0]:
            values = [outputs[name] for outputs in alone]
            outputs[name] = place(values, begins, 0) if has_time else torch.cat(values)
        return inputs, outputs

    return case


def place(rows: Sequence[torch.Tensor], begins: Sequence[int], fill: int) -> torch.Tensor:
    """Rows [1, n, ...] in one batch [B, SHORT, ...], each at its place."""
    batch = rows[0].new_full((len(rows), SHORT, *rows[0].shape[2:]), fill)
    for i, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        batch[i, begin : begin + row.shape[1]] = row[0]
    return batch


def loss(reference: Reference, draw: Draw) -> Case:
    """Labels with some that do not count."""
    task, config = reference.variant.task, reference.config
    inputs = {"input_ids": draw.ids(4, 12)}
    if task == "question-answering":  # what lies past the end does not count either
        inputs["start_positions"] = torch.tensor([2, 17, 0, 12])
        inputs["end_positions"] = torch.tensor([11, 5, 12, -3])
    else:
        high = config.vocab_size if task == "causal-lm" else config.num_labels
        inputs["labels"] = draw.labels(high, 4, 12)
    outputs = reference.run(**inputs)
    return inputs, {"loss": outputs["loss"]} if task == "causal-lm" else outputs


def single_label(reference: Reference, draw: Draw) -> Case:
    inputs = {
        "input_ids": draw.ids(4, 12),
        "labels": draw.integers(reference.config.num_labels, 4),
    }
    return inputs, reference.run(**inputs)


def multi_label(reference: Reference, draw: Draw) -> Case:
    inputs = {
        "input_ids": draw.ids(4, 12),
        "labels": draw.integers(2, 4, reference.config.num_labels).float(),
    }
    return inputs, reference.run(**inputs)


def regression(reference: Reference, draw: Draw) -> Case:
    labels = reference.config.num_labels
    inputs = {
        "input_ids": draw.ids(4, 12),
        "labels": draw.normal(4) if labels == 1 else draw.normal(4, labels),
    }
    return inputs, reference.run(**inputs)


CASES: dict[str, Callable[[Reference, Draw], Case]] = {
    "whole": whole,
    "decode": decode,
    "prefixes": prefixes,
    "hidden": hidden,
    "attentions": attentions,
    "embeds": embeds,
    "positions": positions,
    "packed": packed,
    "left_padded": padded([SHORT - n for n in LENGTHS]),
    "right_padded": padded([0] * len(LENGTHS)),
    "both_padded": padded([(SHORT - n + 1) // 2 for n in LENGTHS]),
    "loss": loss,
    "single_label": single_label,
    "multi_label": multi_label,
    "regression": regression,
}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
