#!/usr/bin/env python3
"""Times a large chat history: searching it, listing its chats, opening a long one, writing to it.

scripts/bench_history.py                    # 100,000 messages in a temporary directory
scripts/bench_history.py --messages 20000

The words are drawn from a vocabulary whose frequencies fall as in natural text (Zipf), from a fixed
seed; a message in ten is Chinese. Each figure is the median and the worst of 15 runs.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from app.history import incoming
from app.history.incoming import IncomingChat, IncomingMessage
from app.history.search import search
from app.history.store import History

LONG_CHAT = 5000
CHAT = 40
RUNS = 15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--messages", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "history.sqlite3"
        history = History(path)
        started = time.perf_counter()
        texts = fill(history, arguments.messages)
        print(
            f"built in {time.perf_counter() - started:.1f} s: {arguments.messages} messages, ",
            end="",
        )
        print(f"{texts / 1e6:.0f} MB of text, ", end="")
        history.close()
        print(f"file {path.stat().st_size / 1e6:.0f} MB\n")
        measure("open the file", lambda: History(path).close())
        history = History(path)
        for query in QUERIES:
            found = len(search(history, query))
            measure(f"search {query!r} ({found} found)", lambda q=query: search(history, q))
        measure("list all chats with counts", history.conversations)
        measure("list the first 50", lambda: history.conversations(limit=50))
        long_chat = next(c for c in history.conversations() if c.messages >= LONG_CHAT)
        measure(f"last 30 of {long_chat.messages} turns", lambda: history.page(long_chat.id, 30))
        page = history.page(long_chat.id, 30)
        first = page.turns[0].message.id
        measure("the 30 before", lambda: history.page(long_chat.id, 30, above=first))
        measure("the whole path of it", lambda: history.path_to_leaf(long_chat.id))
        measure("switch to the first branch", lambda: history.choose(1))
        answer = history.append(long_chat.id, long_chat.active, "assistant", "", state="streaming")
        measure("save 20 kB of an answer", lambda: history.update_text(answer.id, "text " * 4000))
        leaf = answer.id

        def say() -> None:
            history.append(long_chat.id, leaf, "user", "A question of some words. " * 10)

        measure("append a branch at its end", say)
        history.close()
    return 0


QUERIES = ["wa", "wab wac", "wbcd", "zzunique", "aragr", "数据", "北", '"wab wac"', "->", "nowhere"]


def fill(history: History, messages: int) -> int:
    """Returns the characters written."""
    draw = random.Random(0)
    letters = "abcdefghij"
    vocabulary = [
        f"w{a}{b}{c}{d}" for a in letters for b in letters for c in letters for d in letters
    ]
    vocabulary = ["wa", "wab", "wac", *vocabulary]
    weights = [1 / rank for rank in range(1, len(vocabulary) + 1)]
    pool = draw.choices(vocabulary, weights, k=200_000)
    signs = [chr(0x4E00 + draw.randrange(3000)) for _ in range(3000)] + list("数据库北京") * 20
    written = 0
    chats = []
    left = messages
    while left > 0:
        size = LONG_CHAT if not chats else min(left, CHAT)
        chat = IncomingChat(uid=f"bench-{len(chats)}")
        for number in range(min(size, left)):
            if number % 10 == 9:
                text = "".join(draw.choices(signs, k=200))
            else:
                start = draw.randrange(len(pool) - 200)
                text = " ".join(pool[start : start + draw.randrange(10, 160)])
            if draw.random() < 0.001:
                text += " zzunique paragraph"
            role = "assistant" if number % 2 else "user"
            parent = number - 1 if number else None
            chat.messages.append(IncomingMessage(role, text, parent))
            written += len(text)
        left -= size
        chats.append(chat)
    incoming.store(history, chats)
    return written


def measure(what: str, action: Callable[[], object]) -> None:
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        action()
        times.append(1000 * (time.perf_counter() - started))
    print(f"{what:<40} {statistics.median(times):8.2f} ms  (worst {max(times):.2f})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
