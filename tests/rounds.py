"""How often the tests that draw at random repeat: a few times here, many times in scripts/prove."""

from __future__ import annotations

import os

SCALE = int(os.environ.get("GRYPHON_PROVE_SCALE", "1"))


def rounds(in_ci: int) -> range:
    """Round numbers, for `pytest.mark.parametrize`; a test's name then says which one failed.

    Run one again with the GRYPHON_PROVE_SCALE that it failed under.
    """
    return range(in_ci * SCALE)
