"""Installed models as Ollama describes them: listed, running, and shown one by one.

Clients (Zed, Copilot, JetBrains' assistant) find out here which models there are, what they can do
and how much they read.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from app.engine.abilities import Abilities
from app.engine.protocol import EngineStatus
from app.errors import GryphonError
from app.library.details import ModelDetails, describe
from app.library.infill import can_infill
from app.library.installed import InstalledModel
from app.server.timestamp import timestamp

# Said of models that have no limit: clients take a missing number for 2048 or 4096.
NO_LIMIT = 2**20
# As far in the future as Ollama puts what never happens: the longest duration of Go.
_NEVER_S = (2**63 - 1) / 1e9

_LATEST = ":latest"


def installed_as(name: str, models: list[InstalledModel]) -> InstalledModel | None:
    """The model that a client means: Ollama's names have a tag and no case. None for none.

    A name as it is installed comes before one that differs.
    """
    by_name = {model.name: model for model in models}
    plain = name[: -len(_LATEST)] if name.lower().endswith(_LATEST) else name
    for wanted in (name, plain):
        if wanted in by_name:
            return by_name[wanted]
    same = [model for model in models if model.name.casefold() == plain.casefold()]
    return same[0] if len(same) == 1 else None


def digest_of(model: InstalledModel) -> str:
    """64 hexadecimal digits that change with the model's files."""
    what = f"{model.name}\n{model.path}\n{model.size_bytes}\n{model.modified}"
    return hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()


def human_number(count: int) -> str:
    """135M, 1.5B: as Ollama writes numbers of parameters."""
    for size, letter, digits in ((10**9, "B", 1), (10**6, "M", 2)):
        if count >= size:
            return f"{count / size:.{0 if count % size == 0 else digits}f}{letter}"
    return f"{count / 1000:.0f}K" if count >= 1000 else str(count)


class ModelPages:
    """What is said of installed models. Reads their files: not on the event loop."""

    def __init__(self) -> None:
        self._details: dict[str, tuple[float, ModelDetails | None]] = {}

    def listed(self, models: list[InstalledModel]) -> dict[str, Any]:
        """Body of `/api/tags`."""
        return {"models": [self._listed(model) for model in models]}

    def running(self, status: EngineStatus | None, models: list[InstalledModel]) -> dict[str, Any]:
        """Body of `/api/ps`: the resident model or none."""
        if status is None or status.model is None:
            return {"models": []}
        model = next((one for one in models if one.ref == status.model), None)
        size = status.weight_bytes + status.state_bytes + status.scratch_bytes + status.prefix_bytes
        left_s = _NEVER_S if status.keep_alive_left_s is None else status.keep_alive_left_s
        one: dict[str, Any] = {"name": status.model.name, "model": status.model.name, "size": size}
        one["digest"] = digest_of(model) if model is not None else ""
        one["details"] = self._summary(model) if model is not None else _summary("", "", "")
        one["expires_at"] = timestamp(time.time() + left_s)
        one["size_vram"] = size if "GPU" in status.device else 0
        one["context_length"] = status.context_length or NO_LIMIT
        return {"models": [one]}

    def shown(self, model: InstalledModel, abilities: Abilities) -> dict[str, Any]:
        """Body of `/api/show`."""
        details = self._of(model)
        shown: dict[str, Any] = {
            "license": (details.license if details is not None else "") or "",
            "modelfile": f"# The model of `gryphon show {model.name}`.\nFROM {model.name}\n",
            "parameters": _parameters(model),
            "template": abilities.template,
            "details": self._summary(model),
            "model_info": _info(model, details),
            "capabilities": _capabilities(abilities, can_infill(model.path)),
            "modified_at": timestamp(model.modified),
        }
        return shown

    def _listed(self, model: InstalledModel) -> dict[str, Any]:
        return {
            "name": model.name,
            "model": model.name,
            "modified_at": timestamp(model.modified),
            "size": model.size_bytes,
            "digest": digest_of(model),
            "details": self._summary(model),
        }

    def _summary(self, model: InstalledModel) -> dict[str, Any]:
        details = self._of(model)
        count = human_number(details.parameters) if details is not None else ""
        return _summary(model.family, count, model.quantization, model.base)

    def _of(self, model: InstalledModel) -> ModelDetails | None:
        """None where the files have become unreadable since they were listed."""
        known = self._details.get(model.name)
        if known is None or known[0] != model.modified:
            try:
                details = describe(model)
            except (GryphonError, OSError):
                details = None
            known = self._details[model.name] = model.modified, details
        return known[1]


def _summary(family: str, count: str, quantization: str, base: str = "") -> dict[str, Any]:
    return {
        "parent_model": base,
        "format": "safetensors",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": count,
        "quantization_level": quantization,
    }


def _info(model: InstalledModel, details: ModelDetails | None) -> dict[str, Any]:
    """`model_info`, under the names that GGUF files have for it."""
    family = model.family
    info: dict[str, Any] = {
        "general.architecture": family,
        # What Copilot calls the model.
        "general.basename": model.name,
        "general.quantization": model.quantization,
        f"{family}.context_length": model.context_length or NO_LIMIT,
    }
    if details is None:
        return info
    info["general.parameter_count"] = details.parameters
    facts = {
        "embedding_length": details.hidden_size,
        "block_count": details.layers,
        "attention.head_count": details.heads,
        "attention.head_count_kv": details.kv_heads,
        "vocab_size": details.vocab_size,
    }
    return info | {f"{family}.{name}": fact for name, fact in facts.items() if fact is not None}


def _capabilities(abilities: Abilities, fills_gaps: bool) -> list[str]:
    # Every model here writes text. Ollama says "embedding" of models that do nothing else, and
    # clients then keep them out of chats; /api/embed takes any.
    further = {"tools": abilities.tools, "insert": fills_gaps, "thinking": abilities.thinks}
    return ["completion", *(name for name, can in further.items() if can)]


_GENERATION_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repeat_penalty",
}


def _parameters(model: InstalledModel) -> str:
    """The model's own recommendations, a line each, under Ollama's names."""
    try:
        settings = json.loads((model.path / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    if not isinstance(settings, dict):
        return ""
    lines = [
        f"{name:30} {settings[key]}"
        for key, name in _GENERATION_NAMES.items()
        if isinstance(settings.get(key), int | float)
    ]
    return "\n".join(lines)
