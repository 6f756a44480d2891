"""`broker init`: makes a configuration with its secrets, and says what comes next.

On a terminal it asks for what no flag says.  The vendor's key is typed unseen, or comes from a
file or standard input: what is an argument can be read by everybody on the machine.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from broker.cli.base import Commands
from broker.exit_codes import EX_NO, EX_OK, EX_USAGE
from broker.model import Secret
from broker.telemetry.streams import complain, stderr, tell

if TYPE_CHECKING:
    from broker.cli.first_files import Answers

KINDS = ("relay", "signer")
"""Relays the vendor's tokens; signs its own."""

AGENT = re.compile(r"\*|[A-Za-z0-9_-]{1,64}")
"""An agent as the wire has it, or all of them."""

KEY = re.compile(r"[!-~]{1,4096}")
"""A vendor's key: it goes into a header, so printable ASCII without blanks."""

FOLDER = re.compile(r"[A-Za-z0-9/._+@-]+")
"""A path that a unit, a URL and a shell take as it stands."""

SYSTEM_FOLDER, OWN_FOLDER = "/etc/embed-token-broker", "embed-token-broker"
"""Where root configures a service; where anybody else tries one."""


class Unanswered(Exception):
    """Something was left open; the message says what and how to say it."""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "init",
        "make a configuration, its secrets and a systemd unit; asks for what no flag says",
        run,
        example="--kind relay --agent A78WKV4515 --vendor-key-file vendor.key",
        codes={
            EX_NO: "something is there already, or cannot be written",
            EX_USAGE: "wrong usage, or an answer is missing; nothing was written",
        },
        needs_config=False,
    )
    parser.add_argument(
        "--kind",
        metavar="KIND",
        choices=KINDS,
        help="relay: tokens of the vendor; signer: tokens signed here, for a viewer of yours",
    )
    folder = SYSTEM_FOLDER if os.geteuid() == 0 else OWN_FOLDER
    parser.add_argument(
        "--folder", metavar="DIR", default=folder, help="where to write (default %(default)s)"
    )
    parser.add_argument("--agent", metavar="AGENT", help="what your backend may ask for; * for all")
    parser.add_argument(
        "--vendor-key-file", metavar="FILE", help="file with the vendor's key; - for standard input"
    )
    parser.add_argument("--base-url", metavar="URL", help="ask this vendor, such as a fake one")
    parser.add_argument(
        "--listen",
        metavar="H:P",
        default="127.0.0.1:8080",
        help="where backends ask (default %(default)s)",
    )
    parser.add_argument(
        "--admin-listen",
        metavar="H:P",
        default="127.0.0.1:9464",
        help="for metrics and probes (default %(default)s)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="write configuration and unit anew; secrets that are there are kept",
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask, write, and tell what was written and what is next."""
    from broker.cli import first_files

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        answers = _answers(arguments)
    except KeyboardInterrupt:  # not at once: what is typed unseen would stay so for the shell
        complain("")
        complain("broker init: interrupted; nothing was written")
        stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
        raise
    except Unanswered as error:
        complain(f"broker init: {error}")
        return EX_USAGE
    finally:
        signal.signal(signal.SIGINT, before)
    there = answers.there()
    if there and not arguments.force:
        complain(
            f"broker init: {there[0]} is there already; --force writes configuration and"
            " unit anew and keeps secrets, --folder writes elsewhere"
        )
        return EX_NO
    try:
        for line in first_files.write(answers):
            tell(line)
    except OSError as error:
        where, why = error.filename or answers.folder, error.strerror or "error"
        complain(f"broker init: cannot write {where}: {why}; --folder writes elsewhere")
        return EX_NO
    tell(first_files.next_steps(answers))
    for note in first_files.hidden(answers):
        complain(note)
    return EX_OK


def _answers(arguments: argparse.Namespace) -> "Answers":
    """Return what flags and answers say; raises Unanswered, ConfigError."""
    import tomllib

    from msgspec.structs import replace

    from broker.cli import first_files
    from broker.config import load as config

    kind = arguments.kind or _asked("--kind", f"{' or '.join(KINDS)}?", _no_kind, KINDS[0])
    if kind != "relay" and (arguments.vendor_key_file or arguments.base_url):
        raise Unanswered("--vendor-key-file and --base-url are for a relay; a signer asks nobody")
    question = "agent your backend may ask for (* for all)?"
    agent = arguments.agent or _asked("--agent", question, _no_agent)
    if wrong := _no_agent(agent):
        raise Unanswered(wrong)
    folder = Path(arguments.folder).absolute()
    if not FOLDER.fullmatch(str(folder)):
        raise Unanswered(f"--folder: {folder} has more than letters, digits and /._+@-")
    answers = first_files.Answers(
        kind,
        folder,
        agent,
        arguments.listen,
        arguments.admin_listen,
        arguments.base_url,
    )
    config.from_tree(tomllib.loads(first_files.configuration(answers)))
    has_key = os.path.lexists(answers.secrets / first_files.OWN_SECRET["relay"])
    if kind != "relay" or has_key:
        return answers
    return replace(answers, vendor_key=_vendor_key(arguments.vendor_key_file))


def _no_kind(answer: str) -> str:
    """Say why this is no answer, "" if it is one."""
    return "" if answer in KINDS else f"{answer!r} is no kind: say {' or '.join(KINDS)}"


def _no_agent(answer: str) -> str:
    told = f"{answer!r} is no agent: 1 to 64 letters, digits, _ and -; or * for all"
    return "" if AGENT.fullmatch(answer) else told


def _no_key(answer: str) -> str:
    told = "the vendor's key must be one word of printable ASCII"
    return "" if KEY.fullmatch(answer) else told


def _asked(flag: str, question: str, wrong: Callable[[str], str], default: str = "") -> str:
    """Return the answer of somebody at a terminal, who is told what is `wrong` and asked again."""
    if not sys.stdin.isatty():
        raise Unanswered(f"{flag} is missing; on a terminal it would be asked for")
    shown = f"{question} [{default}] " if default else f"{question} "
    while True:
        stderr.flush()
        print(shown, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise Unanswered(f"no answer; {flag} says it, too")
        answer = line.strip() or default
        if not (told := wrong(answer)):
            return answer
        complain(told)


def _vendor_key(file: str | None) -> Secret:
    """Return the vendor's key from a file, standard input, or somebody who types it unseen."""
    if file == "-":
        from broker.config.files import MAX_FILE

        text = sys.stdin.buffer.read(MAX_FILE).decode("utf-8", "replace")
    elif file is not None:
        from broker.config.load import secret_in

        text = secret_in("--vendor-key-file", file).reveal()
    elif sys.stdin.isatty():
        text = _typed_unseen("the vendor's key (it is not shown): ")
    else:
        raise Unanswered("--vendor-key-file is missing; on a terminal the key would be asked for")
    key = text.strip()
    if wrong := _no_key(key):
        raise Unanswered(wrong)
    return Secret(key)


def _typed_unseen(prompt: str) -> str:
    import getpass

    while True:
        stderr.flush()
        try:
            key = getpass.getpass(prompt)
        except EOFError:
            raise Unanswered("no key; --vendor-key-file names a file with it") from None
        if not (told := _no_key(key.strip())):
            return key
        complain(told)
