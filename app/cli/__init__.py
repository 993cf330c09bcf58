"""The `gryphon` command. A face is imported only when it is asked for, so `--help` is instant."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from app import __version__
from app.cli.editors import EDITORS
from app.errors import GryphonError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

DEFAULT_PORT = 11500
# A small model may repeat itself for as long as it is let; a person has Ctrl-C, a script has not.
RUN_MAX_TOKENS = 1024

_EPILOG = """\
Without a command, `gryphon` opens the chat and serves the REST endpoint beside it.
The first command that needs a model fetches the embedded one, SmolLM2-135M-Instruct (93 MB).
Exit status: 0 fine, 1 failed (one sentence on standard error), 2 wrong usage, 130 interrupted.
"""


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, metavar="T", help="0 to 2; 0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P", help="0 to 1; 1 is off")
    group.add_argument("--top-k", type=int, metavar="K", help="0 is off")
    group.add_argument("--min-p", type=float, metavar="P", help="0 to 1; 0 is off")
    group.add_argument("--typical-p", "--typical", type=float, metavar="P", help="0 to 1; 1 is off")
    group.add_argument(
        "--xtc-probability", type=float, metavar="P",
        help="how often the likeliest tokens are excluded: 0 to 1; 0 is off",
    )  # fmt: skip
    group.add_argument(
        "--xtc-threshold", type=float, metavar="P", help="how likely those are: 0 to 0.5"
    )
    group.add_argument(
        "--repetition-penalty", "--repeat-penalty", type=float, metavar="F",
        help="0.1 to 10; 1 is off",
    )  # fmt: skip
    group.add_argument("--presence-penalty", type=float, metavar="F", help="-2 to 2; 0 is off")
    group.add_argument("--frequency-penalty", type=float, metavar="F", help="-2 to 2; 0 is off")
    group.add_argument(
        "--logit-bias", action="append", default=[], metavar="ID=BIAS",
        help="make a token likelier, or less likely: -100 to 100 (repeatable)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, help="same seed, same text")


def _constraint_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "form of the answer", "At most one; what it allows is all that the model can write."
    )
    group.add_argument("--format", choices=["json"], help="any JSON object")
    group.add_argument(
        "-j", "--json-schema", metavar="SCHEMA", help="JSON of this schema: its text, or a file"
    )
    group.add_argument("--regex", metavar="REGEX", help="text that this matches from end to end")
    group.add_argument(
        "--grammar", "--grammar-file", metavar="FILE", help="text of this Lark grammar"
    )


def _server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("REST endpoint")
    group.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    group.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"default: {DEFAULT_PORT}")
    group.add_argument(
        "--socket", type=Path, metavar="PATH",
        help="a UNIX socket instead of host and port, for your own programs only",
    )  # fmt: skip
    key = group.add_mutually_exclusive_group()
    key.add_argument(
        "--api-key", metavar="KEY",
        help="required of every request; better in GRYPHON_API_KEY, which no process list shows",
    )  # fmt: skip
    key.add_argument(
        "--generate-key", action="store_true",
        help="require a new key that Gryphon makes and keeps; off loopback it has one anyway",
    )  # fmt: skip
    group.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="serve https with this PEM certificate"
    )
    group.add_argument(
        "--tls-key", type=Path, metavar="FILE", help="its key; default: in the certificate's file"
    )
    group.add_argument(
        "--allow-origin", action="append", default=[], metavar="ORIGIN",
        help="a web origin that may call the endpoint (repeatable)",
    )  # fmt: skip


def _model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        help="an installed model (`gryphon list`), an alias or the path of a model "
        "directory; default: `gryphon use`",
    )


def _yes_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask before a download")


def _packing_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization")
    group.add_argument("-q", "--bits", type=int, metavar="BITS", help="2, 3, 4, 5, 6 or 8")
    group.add_argument(
        "--group-size", type=int, metavar="N", help="weights that share a scale: 32, 64 or 128"
    )
    group.add_argument("--mode", metavar="MODE", help="affine (default), mxfp4, mxfp8 or nvfp4")
    group.add_argument(
        "--recipe", metavar="NAME",
        help="instead of -q, more bits where it counts: mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6",
    )  # fmt: skip


def _conversion_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-bytes", type=int, metavar="N",
        help="of weights in a file of the result, and what a kill can cost; default: 1 GB",
    )  # fmt: skip


def _chats_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chats = commands.add_parser(
        "chats",
        help="list, search, show, export, import and remove chats",
        description="The chats in the history. Without an action, lists them.",
    )
    # Of the list, when there is no action.
    chats.add_argument("--json", action="store_true")
    chats.set_defaults(folder=None, limit=0)
    actions = chats.add_subparsers(dest="action", metavar="ACTION")

    def action(name: str, description: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=description)
        parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
        return parser

    chat_list = action("list", "all chats, pinned ones first, then the one used last")
    chat_list.add_argument("--folder", metavar="NAME", help="those in this folder")
    chat_list.add_argument("--limit", type=int, default=0, metavar="N", help="default: all")
    chat_search = action("search", "find words in titles and messages")
    chat_search.add_argument("words", nargs="+", help='all must be there; "double quotes" join')
    chat_search.add_argument("--limit", type=int, default=20, metavar="N", help="default: 20")
    chat_show = action("show", "print a chat")
    chat_show.add_argument("chat", type=int, help="its number, as `gryphon chats` lists it")
    chat_export = action("export", "write chats to a file")
    chat_export.add_argument("chats", type=int, nargs="*", metavar="CHAT", help="default: all")
    chat_export.add_argument(
        "--format", choices=["json", "markdown"], default="json",
        help="json (default) holds everything and can be imported; markdown is for reading",
    )  # fmt: skip
    chat_export.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="a new file; default: standard output"
    )
    chat_import = action("import", "add the chats of a file")
    chat_import.add_argument(
        "file", type=Path,
        help="JSON: an export of Gryphon or ChatGPT (its archive too), or messages as OpenAI's and "
        "Ollama's APIs take them",
    )  # fmt: skip
    chat_rm = action("rm", "remove chats, and what the engine keeps of them")
    chat_rm.add_argument("chats", type=int, nargs="+", metavar="CHAT")
    chat_rm.add_argument("-y", "--yes", action="store_true", help="do not ask")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="gryphon",
        description="Chat with a language model that runs on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gryphon {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    chat = commands.add_parser("chat", help="the terminal chat (what plain `gryphon` does)")
    _model_option(chat)
    _server_options(chat)
    chat.add_argument("--no-serve", action="store_true", help="no REST endpoint beside the chat")

    _chats_command(commands)

    run = commands.add_parser(
        "run",
        help="answer one prompt on standard output",
        description="Answer one prompt on standard output. Text piped in comes before the prompt.",
    )
    run.add_argument("prompt", nargs="?", help="the prompt; standard input alone will do")
    _model_option(run)
    _yes_option(run)
    run.add_argument("--system", metavar="TEXT", help="a system message")
    run.add_argument("--raw", action="store_true", help="no chat template: continue the text as is")
    run.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"default: {RUN_MAX_TOKENS}",
    )
    run.add_argument(
        "--min-tokens", type=int, default=0, metavar="N", help="the answer does not end before"
    )
    run.add_argument(
        "--ignore-eos", action="store_true", help="the model cannot end the answer by itself"
    )
    run.add_argument("--stop", action="append", default=[], metavar="TEXT", help="repeatable")
    run.add_argument(
        "--no-wait", action="store_true", help="fail instead of waiting while another model answers"
    )
    run.add_argument(
        "--adapter", type=Path, metavar="DIR", help="put this LoRA adapter of mlx-lm on the model"
    )
    guess = run.add_mutually_exclusive_group()
    guess.add_argument(
        "--draft", metavar="MODEL", help="let a smaller model of the same vocabulary guess ahead"
    )
    guess.add_argument(
        "--prompt-lookup", action="store_true", help="guess ahead from the text itself"
    )
    run.add_argument("--json", action="store_true", help="events, one JSON object a line")
    run.add_argument(
        "--hide-thinking", action="store_true", help="do not show what the model thinks first"
    )
    run.add_argument("--stats", action="store_true", help="counts and speeds on standard error")
    _constraint_options(run)
    _sampling_options(run)

    serve = commands.add_parser("serve", help="the REST endpoint alone")
    _yes_option(serve)
    _server_options(serve)
    serve.add_argument("--access-log", action="store_true", help="log each request, never prompts")

    pull = commands.add_parser(
        "pull",
        help="fetch a model",
        description="Fetch a model from the Hugging Face Hub into its cache, where other programs "
        "find it too. What an interrupted pull has fetched is kept: pull again to continue. With "
        "-q a full-precision model is fetched, converted to a quantized one and removed.",
    )
    pull.add_argument(
        "name", metavar="MODEL", help="ORG/NAME on the hub, ORG/NAME@REVISION, or smollm2-135m"
    )
    pull.add_argument("--revision", metavar="REV", help="a branch, tag or commit; default: main")
    _yes_option(pull)
    pull.add_argument("--dry-run", action="store_true", help="say what it would fetch, and stop")
    pull.add_argument("--json", action="store_true", help="events, one JSON object a line")
    _packing_options(pull)
    pull.add_argument(
        "--out", metavar="NAME", help="with -q: what the result is called; default: NAME-4bit"
    )
    pull.add_argument(
        "--keep-source", action="store_true", help="with -q: keep what was fetched, as a model too"
    )
    _conversion_options(pull)

    convert = commands.add_parser(
        "convert",
        help="quantize a model, or bring it into MLX's form",
        description="Convert a checkpoint on this machine: a directory as Hugging Face's "
        "transformers write it, an installed model, or a GGUF file of the llama architecture. "
        "The source stays. What an interrupted conversion has written is kept: the same command "
        "goes on from there.",
    )
    convert.add_argument("source", metavar="SRC", help="a directory, an installed model, a .gguf")
    _packing_options(convert)
    convert.add_argument(
        "--dtype", metavar="DTYPE",
        help="of what is not quantized: bfloat16, float16, float32; default: what config.json says",
    )  # fmt: skip
    convert.add_argument(
        "--out", metavar="OUT",
        help="name of the result among Gryphon's models, or a new directory; default: SRC-4bit",
    )  # fmt: skip
    convert.add_argument(
        "--eval", type=Path, metavar="FILE",
        help="report how well source and result foretell this text (perplexity)",
    )  # fmt: skip
    _conversion_options(convert)
    convert.add_argument("-y", "--yes", action="store_true", help="do not ask")
    convert.add_argument("--dry-run", action="store_true", help="say what it would make, and stop")
    convert.add_argument("--json", action="store_true", help="events, one JSON object a line")

    search = commands.add_parser(
        "search", help="find models on the hub", description="Models of the Hugging Face Hub that "
        "Gryphon can run, most downloaded first; or the catalog that comes with Gryphon, which "
        "asks nobody.",
    )  # fmt: skip
    search.add_argument("query", nargs="?", help="words of the name; not needed with --catalog")
    search.add_argument(
        "--catalog", action="store_true", help="quantized builds known to exist, by family"
    )
    search.add_argument("--limit", type=int, default=20, metavar="N", help="default: 20")
    search.add_argument("--json", action="store_true")

    listing = commands.add_parser("list", help="installed models")
    listing.add_argument("--json", action="store_true")

    show = commands.add_parser("show", help="what a model is")
    show.add_argument("name", nargs="?", help="default: the model that would be used")
    what = show.add_mutually_exclusive_group()
    what.add_argument("--fit", action="store_true", help="what it takes in memory, and if it fits")
    what.add_argument("--template", action="store_true", help="its chat template")
    what.add_argument("--config", action="store_true", help="its config.json")
    show.add_argument("--json", action="store_true")

    use = commands.add_parser(
        "use", help="the model that is used when none is named: set it, or show it"
    )
    use.add_argument("name", nargs="?", metavar="MODEL", help="an installed model")
    use.add_argument("--unset", action="store_true", help="set none")
    use.add_argument("--json", action="store_true")

    alias = commands.add_parser(
        "alias",
        help="another name for an installed model",
        description="Let NAME stand for an installed model, everywhere a model is named; without "
        "NAME, list the aliases. The files stay where they are.",
    )
    alias.add_argument("name", nargs="?", metavar="NAME")
    alias.add_argument("model", nargs="?", metavar="MODEL")
    alias.add_argument("--rm", metavar="NAME", help="forget an alias; the model stays")
    alias.add_argument("--json", action="store_true", help="of the list")

    adapters = commands.add_parser("adapters", help="LoRA adapters made by mlx-lm")
    action = adapters.add_subparsers(dest="action", metavar="ACTION", required=True)
    adapter_list = action.add_parser("list", help="installed adapters")
    adapter_list.add_argument("--json", action="store_true")
    adapter_add = action.add_parser("add", help="install one; it becomes the model BASE+NAME")
    adapter_add.add_argument("directory", type=Path, help="what `mlx_lm.lora` wrote")
    adapter_add.add_argument("--name", help="default: the directory's name")
    adapter_add.add_argument(
        "--base", metavar="MODEL", help="the installed model it goes with; default: what it says"
    )
    adapter_rm = action.add_parser("rm", help="remove one")
    adapter_rm.add_argument("name")

    verify = commands.add_parser(
        "verify", help="read a model's files and compare them with their digests"
    )
    verify.add_argument("name", nargs="?", help="default: the model that would be used")
    verify.add_argument(
        "--repair", action="store_true", help="fetch what is damaged again, from the hub"
    )
    verify.add_argument("--json", action="store_true")

    remove = commands.add_parser("rm", help="remove a model")
    remove.add_argument("name", metavar="MODEL")
    remove.add_argument("-y", "--yes", action="store_true", help="do not ask")
    remove.add_argument("--dry-run", action="store_true", help="say what it would free, and stop")
    remove.add_argument("--json", action="store_true")

    du = commands.add_parser("du", help="what models and the rest take on the disk")
    du.add_argument("--json", action="store_true")

    prune = commands.add_parser(
        "prune",
        help="remove what no model needs from the disk",
        description="Remove unfinished pulls, commits that no branch or tag names any more, and "
        "what ended processes left. What changed within the last hour stays. Other programs share "
        "the Hugging Face cache: what they fetched by the number of its commit goes too where a "
        "branch names another one.",
    )
    prune.add_argument("-y", "--yes", action="store_true", help="do not ask")
    prune.add_argument("--dry-run", action="store_true", help="say what would go, and stop")
    prune.add_argument("--json", action="store_true")

    ps = commands.add_parser("ps", help="what the engine is doing")
    ps.add_argument("--json", action="store_true")

    commands.add_parser(
        "forget",
        help="drop what the engine keeps of earlier prompts and answers",
        description="Drop what the engine keeps of earlier prompts and answers to continue from, "
        "in memory and on disk. Chats stay in the history; their next turn takes longer once.",
    )

    editor = commands.add_parser(
        "editor",
        help="what an editor or a coding agent has to be told to use Gryphon",
        description="Print the configuration that makes an editor or a coding agent use the models "
        "of this machine, and where it goes. --write puts it there, after showing what would "
        "change, keeps the rest of the file as it is, and a copy of how it was.",
    )
    editor.add_argument("name", metavar="EDITOR", choices=EDITORS, help=", ".join(EDITORS))
    editor.add_argument("-m", "--model", help="this model alone; default: every installed one")
    editor.add_argument(
        "--port", type=int, help=f"default: the endpoint that runs, else {DEFAULT_PORT}"
    )
    editor.add_argument("--write", action="store_true", help="merge it into the editor's files")
    editor.add_argument("-y", "--yes", action="store_true", help="write without asking")
    editor.add_argument(
        "--show-key", action="store_true",
        help="print and write GRYPHON_API_KEY itself instead of where the editor finds it",
    )  # fmt: skip
    editor.add_argument("--json", action="store_true")

    doctor = commands.add_parser("doctor", help="versions, device, paths, and what would be used")
    doctor.add_argument(
        "--kernels", action="store_true", help="check and time every Metal kernel on this machine"
    )
    doctor.add_argument("--json", action="store_true")
    return parser


# Command to the module and function that carries it out.
_COMMANDS = {
    "chat": "app.cli.faces:chat",
    "chats": "app.cli.chats:chats",
    "serve": "app.cli.faces:serve",
    "run": "app.cli.run:run",
    "pull": "app.cli.pull:pull",
    "convert": "app.cli.convert:convert",
    "list": "app.cli.models:list_models",
    "show": "app.cli.models:show",
    "use": "app.cli.names:use",
    "alias": "app.cli.names:alias",
    "adapters": "app.cli.adapters:adapters",
    "search": "app.cli.search:search",
    "verify": "app.cli.upkeep:verify",
    "rm": "app.cli.upkeep:remove",
    "du": "app.cli.disk:du",
    "prune": "app.cli.disk:prune",
    "ps": "app.cli.report:ps",
    "forget": "app.cli.forget:forget",
    "editor": "app.cli.editor:editor",
    "doctor": "app.cli.report:doctor",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. No traceback reaches a person."""
    _open_missing_streams()
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough: leaving takes a moment
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        status = EXIT_OK  # the reader (head, less) has had enough
    except OSError as error:
        print(f"gryphon: {error.strerror or error}: {error.filename or 'output'}", file=sys.stderr)
        status = EXIT_FAILED
    # What is still buffered must not fail again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _run(words: list[str]) -> int:
    parser = build_parser()
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words = ["chat", *words]
    arguments = parser.parse_args(words)
    module, function = _COMMANDS[arguments.command].split(":")
    try:
        status: int = getattr(importlib.import_module(module), function)(arguments)
        return status
    except GryphonError as error:
        if getattr(arguments, "json", False):
            print(json.dumps({"type": "failed", "code": error.code, "message": error.message}))
        else:
            print(f"gryphon: {error.message}", file=sys.stderr)
        return EXIT_USAGE if error.code == "usage" else EXIT_FAILED


def _open_missing_streams() -> None:
    """A closed standard stream reads and writes nothing; a terminal's encoding never fails."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open as long as we are)
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
