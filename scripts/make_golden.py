#!/usr/bin/env python3
"""Writes tests/golden/: tiny random models and what the reference implementations make of them.

Run it with any Python 3.11; it builds an environment of its own per transformers version (torch and
the pinned transformers, about 1 GB each) outside the repository, and does the work inside:

    scripts/make_golden.py                              # all families
    scripts/make_golden.py --model open_llama           # one family
    scripts/make_golden.py --python open_llama=/path/to/venv/bin/python

The models are those of golden_variants.py, the work is golden_reference.py; what the files hold is
written in tests/golden/README.md.
"""

import argparse
import subprocess
import venv
from pathlib import Path

from golden_variants import FAMILIES

SCRIPTS = Path(__file__).resolve().parent
OUTPUT = SCRIPTS.parent / "tests" / "golden"
ENVIRONMENTS = Path.home() / ".cache" / "gryphon" / "golden"

NEWEST = ("torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "safetensors==0.8.0")
# The last release line with Open-Llama and a working cache for it.
PINS = dict.fromkeys(FAMILIES, NEWEST) | {
    "open_llama": ("torch==2.13.0", "transformers==4.40.2", "numpy==1.26.4", "safetensors==0.8.0")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=FAMILIES, action="append", help="family; default all")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="FAMILY=PATH",
        help="use this environment instead of making one",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default tests/golden")
    arguments = parser.parse_args()
    given = dict(item.split("=", 1) for item in arguments.python)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for family in arguments.model or FAMILIES:
        python = given.get(family) or str(environment(PINS[family]))
        worker = SCRIPTS / "golden_reference.py"
        subprocess.run([python, str(worker), family, str(arguments.output)], check=True)


def environment(pins: tuple[str, ...]) -> Path:
    """Python of a virtual environment that holds these packages; made at first use."""
    path = ENVIRONMENTS / pins[1].replace("==", "-")
    python = path / "bin" / "python"
    done = path / "pins.txt"
    if not done.is_file() or done.read_text() != "\n".join(pins):
        venv.create(path, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *pins], check=True)
        done.write_text("\n".join(pins))
    return python


if __name__ == "__main__":
    main()
