"""The engine: one process that owns MLX, and the client through which every face drives it."""
