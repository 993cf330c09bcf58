"""Conversations as a tree in SQLite, on this machine only."""
