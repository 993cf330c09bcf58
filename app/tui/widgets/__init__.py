"""One widget per file, each with the messages it sends."""
