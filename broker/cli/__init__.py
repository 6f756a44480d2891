"""The command line: one file a command; `main(argv)` runs one and returns its exit code."""

from broker.cli.main import main

__all__ = ["main"]
