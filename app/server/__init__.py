"""The local REST endpoint."""
