"""The terminal chat. The command line calls `run_chat`."""

from app.tui.app import run_chat as run_chat
