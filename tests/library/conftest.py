"""Fixtures of the library's tests."""

from ..embedded_model import embedded_gguf, embedded_home

__all__ = ["embedded_gguf", "embedded_home"]
