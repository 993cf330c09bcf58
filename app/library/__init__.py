"""Models on this machine: list, find, pull, convert."""
