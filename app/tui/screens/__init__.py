"""The screens of the terminal chat."""
