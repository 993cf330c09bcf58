"""Gryphon: the engine, its faces (terminal chat, REST endpoint, command line) and the library."""

__version__ = "0.1.0"
