"""`gryphon forget`: drop what the engine keeps of earlier prompts and answers."""

from __future__ import annotations

import argparse
import asyncio

from app import paths
from app.cli.terminal import human_bytes
from app.engine.client import EngineClient
from app.engine.prefix_files import PrefixFiles


async def _forget_everything() -> None:
    client = EngineClient()
    try:
        await client.forget_chat("")
    finally:
        await client.close()


def forget(arguments: argparse.Namespace) -> int:
    """Drop it in memory, where an engine runs, and on disk; chats stay in the history."""
    files = PrefixFiles(paths.prefix_dir())
    size = files.nbytes
    asyncio.run(_forget_everything())
    print(f"Dropped what the engine had kept of prompts and answers: {human_bytes(size)} on disk.")
    return 0
