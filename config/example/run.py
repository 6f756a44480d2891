"""Start the example: fake vendor, broker, shop; `config/example/run` installs what this needs."""

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from shop import Broker, Shop

HERE = Path(__file__).parent

STOP = 10
"""Seconds that a part may take to end; then it is killed."""


class Part:
    """A process whose first line tells where it is; what it logs is shown under its name."""

    def __init__(self, name: str, arguments: Sequence[str], **environ: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "broker", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environ},
            start_new_session=True,  # Ctrl-C is for this process, which stops the others in turn
        )
        assert self.process.stderr is not None
        assert self.process.stdout is not None
        threading.Thread(target=self._show, args=(self.process.stderr,), daemon=True).start()
        first = self.process.stdout.readline()
        if not first:
            raise SystemExit(f"{name} did not start; are its ports taken?  Try --any-port")
        self.told: dict[str, str] = json.loads(first)

    def stop(self) -> None:
        """End it as a supervisor does."""
        self.process.terminate()
        try:
            self.process.wait(STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _show(self, log: IO[str]) -> None:
        for line in log:
            print(f"{self.name:6} | {line}", end="", flush=True)


def main() -> None:
    """Run until Ctrl-C, or until a part ends."""
    parser = argparse.ArgumentParser(prog="config/example/run", description=__doc__)
    parser.add_argument("--any-port", action="store_true", help="take ports that are free")
    any_port = parser.parse_args().any_port

    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):  # also where a script that started it ignores it
        signal.signal(number, ended)
    with ExitStack() as stack:
        try:
            _run(stack, any_port=any_port)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough: the parts are ending
            print("\nstopping ...", flush=True)


def _run(stack: ExitStack, *, any_port: bool) -> None:
    key = secrets.token_urlsafe(24)
    listen = ["--listen", "127.0.0.1:0"] if any_port else []
    vendor = Part("vendor", ["fake-vendor", *listen], BITHUMAN_API_SECRET=key)
    stack.callback(vendor.stop)
    admin = ["--admin-listen", "127.0.0.1:0"] if any_port else []
    config = ["--config", str(HERE / "broker.toml")]
    broker = Part(
        "broker",
        ["serve", "--dev", *config, *listen, *admin],
        BROKER_ISSUER__UPSTREAM__API_SECRET=key,
        BROKER_ISSUER__UPSTREAM__BASE_URL=vendor.told["url"],
    )
    stack.callback(broker.stop)
    try:
        shop = Shop(0 if any_port else 5050, Broker(broker.told["url"], broker.told["api_secret"]))
    except OSError as error:
        raise SystemExit(f"the shop did not start: {error.strerror}.  Try --any-port") from None
    stack.callback(shop.server_close)
    stack.callback(shop.shutdown)
    threading.Thread(target=shop.serve_forever, daemon=True).start()
    print(
        f"\n  Open {shop.url} and ask the guide.  Ctrl-C stops everything."
        f"\n  Metrics: {broker.told['admin_url']}/metrics"
        "\n  Let the vendor fail: "
        f"""curl -s {vendor.told["url"]}/_control/fault -d '{{"fault": "refuse=503"}}'"""
        f"\n  Let it work again:    curl -s -X DELETE {vendor.told['url']}/_control/fault\n",
        flush=True,
    )
    while True:
        for part in (vendor, broker):
            if part.process.poll() is not None:
                raise SystemExit(f"{part.name} has ended with {part.process.returncode}")
        threading.Event().wait(0.5)


if __name__ == "__main__":
    main()
