"""What an answer may be forced to be: any JSON object, a JSON schema, a regex or a Lark grammar.

Checked here is what needs no model. Whether llguidance can follow it is found out when it is
compiled, in a process of its own (`app.engine.matcher_process`).
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, NoReturn

import msgspec

from app.engine.json_schema import check_keywords
from app.errors import GryphonError

MAX_CONSTRAINT_BYTES = 256 * 1024

ConstraintKind = Literal["json_object", "json_schema", "regex", "lark"]
CALLED: dict[ConstraintKind, str] = {
    "json_object": "The constraint",
    "json_schema": "The JSON schema",
    "regex": "The regex",
    "lark": "The grammar",
}

# At most one space, or a new line and its indentation, wherever JSON may have white space: a model
# that knows nothing better could go on with it for ever.
JSON_OPTIONS: dict[str, Any] = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_pattern": r" |\n[ \t]{0,20}",
}


class Constraint(msgspec.Struct, frozen=True):
    """What the whole answer must match, from its first character to its last.

    JSON may have one space or newline with indentation wherever JSON allows white space; in a
    schema every keyword is enforced or the request is refused. Regexes have the syntax of Rust's
    `regex` crate, without look-around; grammars that of llguidance's Lark, whose special tokens
    leave no text.

    The answer ends when nothing may follow, whatever min_tokens and ignore_eos say, and not before
    it is complete; max_tokens and stop strings cut it short as ever. logit_bias, penalties and
    filters choose among what the constraint allows.
    """

    kind: ConstraintKind
    text: str = ""
    """The schema, regex or grammar; empty for "json_object"."""


def check_constraint(constraint: Constraint) -> None:
    """Refuse what no model could follow.

    Raises:
        GryphonError: "invalid_constraint", naming what is wrong with it.
    """
    kind, text = constraint.kind, constraint.text
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_CONSTRAINT_BYTES:
        raise invalid(f"{CALLED[kind]} may have {MAX_CONSTRAINT_BYTES} bytes, got {size}.")
    if kind == "json_object":
        if text:
            raise invalid("A constraint of kind json_object has no text; json_schema has.")
    elif not text.strip():
        raise invalid(f"{CALLED[kind]} is empty.")
    elif kind == "json_schema":
        check_keywords(parsed_schema(text))
    elif kind == "lark" and (found := _TEMPERATURE.search(text)):
        raise invalid(
            f"The grammar sets {found[0].split('[')[-1].strip()!r} of a rule; only the request's "
            "own temperature applies."
        )


# An attribute of a rule, as in `name[temperature=0.5]: ...`, before the colon.
_TEMPERATURE = re.compile(r"^[ \t]*[?!]?[\w-]+[ \t]*\[[^\]\n]*\btemperature\b", re.MULTILINE)


def invalid(message: str) -> GryphonError:
    """The error of a constraint that cannot be followed."""
    return GryphonError("invalid_constraint", message)


def parsed_schema(text: str) -> dict[str, Any]:
    """A JSON schema's text as what it says.

    Raises:
        GryphonError: "invalid_constraint": it is not JSON, or not an object.
    """
    try:
        schema = json.loads(text, parse_constant=_not_json)
    except RecursionError as error:
        raise invalid("The JSON schema is nested too deeply.") from error
    except ValueError as error:
        raise invalid(f"The JSON schema is not JSON: {error}.") from error
    if not isinstance(schema, dict):
        raise invalid(f"The JSON schema must be a JSON object, got {text.strip()[:40]}.")
    return schema


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
