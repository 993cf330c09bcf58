"""`reasoning_effort`, for models whose chat template has a place for it.

Templates know two variables: `enable_thinking`, a switch (Qwen, GLM, SmolLM 3), and
`reasoning_effort`, a word (gpt-oss). Which of them a template knows is read from its text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.library.chat_template import chat_template
from app.server.errors import ApiError
from app.server.validation import shown

DEFAULT = "medium"
EFFORTS = ("none", "minimal", "low", DEFAULT, "high", "xhigh", "max")

_SWITCH, _WORD = "enable_thinking", "reasoning_effort"
# What begins the thoughts of models that have them.
_THOUGHTS = ("<think>", "<|START_THINKING|>", "[THINK]", "<seed:think>", "<|channel>thought")


def effort_options(effort: str | None, path: Path, *, param: str) -> dict[str, Any]:
    """Variables for the chat template of the model in `path`; reads its files.

    Raises:
        ApiError: 400, the model cannot be told.
    """
    if effort is None or effort == DEFAULT:
        return {}
    template = chat_template(path)
    if _WORD in template:
        return {_WORD: effort}
    if _SWITCH in template:
        return {_SWITCH: effort != "none"}
    if effort == "none" and not any(opener in template for opener in _THOUGHTS):
        return {}
    raise ApiError(
        400,
        "unsupported_parameter",
        f"`{param}` = {shown(effort)} is not supported: the model's chat template has no setting "
        "for it. Leave the field out.",
        param=param,
    )
