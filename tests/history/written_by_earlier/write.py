"""Writes a history with the code of an earlier Gryphon, for `test_migrations.py`.

    git archive COMMIT app | tar -x -C DIRECTORY
    PYTHONPATH=DIRECTORY python tests/history/written_by_earlier/write.py version-N.sqlite3

version-1.sqlite3: commit ccb57f9. version-2.sqlite3: commit bd9a32a.
"""

import inspect
import sys
from pathlib import Path

from app.history.store import History

STATS = {
    "reason": "length",
    "usage": {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "cached_tokens": 5,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
    },
    "timings": {"queue_s": 0.25, "prefill_s": 0.5, "decode_s": 1.5},
    "decode_tps": 2.0,
    "context_length": 8192,
}

history = History(Path(sys.argv[1]))
has_reasoning = "reasoning" in inspect.signature(history.finish).parameters
thought = {"reasoning": "Because 漢字 …"} if has_reasoning else {}

sea = history.create_conversation()
why = history.append(sea.id, None, "user", "Why is the séa salty?\nI wonder")
first = history.append(sea.id, why.id, "assistant", "", model="tiny", state="streaming")
history.finish(first.id, "Rivers bring", "complete", stats=STATS, **thought)
second = history.append(sea.id, why.id, "assistant", "", model="tiny", state="streaming")
history.finish(second.id, "", "failed", error="The engine stopped.")
# The path shown leads through the older answer.
more = history.append(sea.id, first.id, "user", "盐从哪里来?")
last = history.append(sea.id, more.id, "assistant", "", model="tiny", state="streaming")
history.update_text(last.id, "From the ro")

other = history.create_conversation()
history.save_draft(other.id, "half a thought")
history.close()
