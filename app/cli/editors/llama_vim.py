"""llama.vim, for Vim and Neovim. Keys: https://github.com/ggml-org/llama.vim (README and
`:help llama_config`), which wants g:llama_config set before the plugin is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from app.cli.editors.configuration import (
    KEY_VARIABLE,
    Configuration,
    Places,
    ScriptFile,
    Setup,
    key_note,
)


def configure(setup: Setup) -> Configuration:
    """A block at the top of the init file that is there, Neovim's before Vim's."""
    path = _init_file(setup.places)
    is_lua = path.suffix == ".lua"
    settings = {
        "endpoint_fim": f"{setup.endpoint.url}/infill",
        "endpoint_inst": f"{setup.endpoint.openai_url}/chat/completions",
        "model_fim": setup.model.name,
        "model_inst": setup.model.name,
    }
    quote = json.dumps if is_lua else _vim_string
    pairs = {key: quote(value) for key, value in settings.items()}
    if setup.endpoint.needs_key:
        variable = f"vim.env.{KEY_VARIABLE}" if is_lua else f"${KEY_VARIABLE}"
        shown = setup.endpoint.shown_key
        pairs["api_key"] = variable if shown is None else quote(shown)
    if is_lua:
        body = ", ".join(f"{key} = {value}" for key, value in pairs.items())
        line = f"vim.g.llama_config = {{ {body} }}"
    else:
        body = ", ".join(f"'{key}': {value}" for key, value in pairs.items())
        line = f"let g:llama_config = {{ {body} }}"
    return Configuration(
        title="llama.vim",
        files=[ScriptFile(path, [line], "--" if is_lua else '"', "llama_config")],
        notes=[
            *key_note(setup, f"start the editor with {KEY_VARIABLE} in its environment."),
            "Completion in the middle of a text needs a model with tokens for it (Qwen2.5-Coder, "
            "StarCoder2, CodeGemma and others); instructions work with any chat model.",
        ],
    )


def _vim_string(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _init_file(places: Places) -> Path:
    candidates = [
        places.xdg_config / "nvim" / "init.lua",
        places.xdg_config / "nvim" / "init.vim",
        places.home / ".vim" / "vimrc",
        places.home / ".vimrc",
    ]
    return next((path for path in candidates if path.exists()), candidates[-1])
