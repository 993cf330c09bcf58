"""The one exception a user of this package can cause."""


class ModelError(ValueError):
    """A model cannot be loaded: one sentence that says what is wrong and what to do about it."""
