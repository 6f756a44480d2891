"""`broker serve --workers N` on the memory store: `memory_workers.py N CONFIG|--dev [FLAGS]`.

The command line refuses that, because each worker would have limits and tokens of its own.  Tests
and benchmarks of the workers themselves need no other process, and reach past that one rule.
"""

import os
import sys
from pathlib import Path

from msgspec.structs import replace

from broker.app import dev
from broker.config import load as config
from broker.config.settings import Settings
from broker.process.serve import serve
from broker.telemetry import logs
from broker.telemetry.streams import open_missing

WORKERS, SOURCE = sys.argv[1], sys.argv[2]
MADE = dev.DevSecrets() if SOURCE == "--dev" else None


def load() -> Settings:
    """Read the settings, then change the one that would be refused."""
    if MADE is None:
        settings = config.load(Path(SOURCE), os.environ, {})
    else:
        listen = {"server": {"listen": "127.0.0.1:0"}, "admin": {"listen": "127.0.0.1:0"}}
        settings = MADE.complete(config.load(None, os.environ, listen, MADE.defaults()))
    return replace(settings, server=replace(settings.server, workers=int(WORKERS)))


if __name__ == "__main__":
    open_missing()
    first = load()
    logs.configure(first.log)
    sys.exit(serve(first, load, dev=MADE is not None))
