"""The command line: start here.

Exit codes follow sysexits.h where it has one: 0 done, 1 the answer is no, 64 wrong usage, 69 an
address or a service is unavailable, 78 the configuration cannot be used.  A second signal while
draining ends the process at once with 128 + its number.
"""

import argparse
import asyncio
import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from typing_extensions import override

from broker.config import load as config
from broker.config import schema, validate
from broker.config.files import MAX_FILE
from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.model import Secret
from broker.telemetry.streams import complain, open_missing, stdout, tell
from broker.version import VERSION

EX_OK, EX_NO, EX_USAGE, EX_UNAVAILABLE, EX_CONFIG = 0, 1, 64, 69, 78

NOTHING_CONFIGURED = (
    "no configuration: pass --config FILE, set BROKER_CONFIG, set BITHUMAN_API_SECRET for a relay,"
    " or try `broker serve --dev`, which needs none; `broker mint` needs none with --url"
)


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        self.exit(EX_USAGE, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    open_missing()
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return command(arguments)
    except ConfigError as error:
        complain(f"broker: {_one_line(error)}")
        return EX_CONFIG


def _one_line(error: object) -> str:
    """Escape what would end the line or move the cursor: names in a file may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="broker", description="Mints, reuses and rate-limits embed tokens.")
    parser.add_argument("--version", action="version", version=f"embed-token-broker {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    serve = commands.add_parser("serve", help="answer requests until stopped")
    _config_flag(serve)
    serve.add_argument(
        "--dev", action="store_true", help="no configuration needed: keys and secret are made"
    )
    serve.add_argument("--listen", metavar="H:P", help="instead of [server] listen")
    serve.add_argument("--admin-listen", metavar="H:P", help="instead of [admin] listen")
    serve.add_argument("--workers", metavar="N", help="instead of [server] workers")
    serve.set_defaults(run=_serve)

    check = commands.add_parser("check", help="check a configuration and say what is wrong")
    _config_flag(check)
    check.set_defaults(run=_check)

    show = (
        commands.add_parser("config", help="the configuration in force")
        .add_subparsers(required=True, metavar="show", parser_class=_Parser)
        .add_parser("show", help="print it, secrets masked")
    )
    _config_flag(show)
    show.set_defaults(run=_config_show)

    mint = commands.add_parser("mint", help="make one token, signed here or asked of a broker")
    _config_flag(mint)
    mint.add_argument("agent", metavar="AGENT")
    mint.add_argument(
        "--fingerprint", required=True, metavar="F", help="hex string of the visitor's device"
    )
    mint.add_argument(
        "--url",
        metavar="U",
        help="ask this broker; the client secret is read from BROKER_API_SECRET",
    )
    mint.add_argument("--iframe", action="store_true", help="print the iframe instead of the token")
    mint.set_defaults(run=_mint)

    verify = commands.add_parser(
        "verify", help="verify the token on standard input with the local keys"
    )
    _config_flag(verify)
    verify.set_defaults(run=_verify)

    doctor = commands.add_parser(
        "doctor", help="examine the relay: keys, clock, TLS, egress proxy, shared store, files"
    )
    _config_flag(doctor)
    doctor.set_defaults(run=_doctor)

    health = commands.add_parser("healthcheck", help="ask the broker of this host if it is ready")
    _config_flag(health)
    health.add_argument("--admin-listen", metavar="H:P", help="instead of [admin] listen")
    health.set_defaults(run=_healthcheck)

    fake = commands.add_parser("fake-vendor", help="a vendor for tests: its limits, no real tokens")
    fake.add_argument(
        "--listen", metavar="H:P", default="127.0.0.1:8090", help="default %(default)s"
    )
    fake.add_argument(
        "--latency", type=float, default=0.0, metavar="S", help="seconds an answer takes"
    )
    fake.set_defaults(run=_fake_vendor)

    _store_commands(commands.add_parser("store", help="the shared store"))
    keys = commands.add_parser("keys", help="signing keys").add_subparsers(
        required=True, metavar="COMMAND", parser_class=_Parser
    )
    generate = keys.add_parser("generate", help="make a key: 32 random bytes as text")
    generate.add_argument(
        "--out",
        metavar="FILE",
        help="write it there (mode 0600, never over a file) instead of printing it",
    )
    generate.set_defaults(run=_keys_generate)

    listing = keys.add_parser("list", help="show which key signs, and until when others verify")
    _config_flag(listing)
    listing.set_defaults(run=_keys_list)

    rotate = keys.add_parser(
        "rotate", help="add a key to [issuer.local] keys_file, which will sign"
    )
    _config_flag(rotate)
    rotate.add_argument(
        "--after",
        metavar="SPAN",
        default="10s",
        type=schema.duration,
        help="when it signs: once every broker and viewer has the file (default %(default)s)",
    )
    rotate.add_argument(
        "--drop-old",
        action="store_true",
        help="the old keys were seen: it signs at once, what they signed is not good any more",
    )
    rotate.set_defaults(run=_keys_rotate)
    return parser


def _store_commands(store: argparse.ArgumentParser) -> None:
    acl = store.add_subparsers(required=True, metavar="acl", parser_class=_Parser).add_parser(
        "acl", help="print the rule for its ACL file: enough for a broker, and no more"
    )
    _config_flag(acl)
    acl.add_argument("--user", metavar="NAME", help="instead of [store] username")
    acl.set_defaults(run=_store_acl)


def _config_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="instead of BROKER_CONFIG or /etc/embed-token-broker/broker.toml",
    )


def _settings(arguments: argparse.Namespace, flags: Mapping[str, Any] | None = None) -> Settings:
    """Load the settings of a command that needs a configuration."""
    path = config.find_file(arguments.config, os.environ)
    if path is not None:
        return config.load(path, os.environ, flags or {})
    if any(os.environ.get(name) for name in config.VENDOR_VARIABLES):
        relay = {"issuer": {"kind": "upstream"}}
        return config.load(None, os.environ, flags or {}, relay)
    if not any(name.startswith("BROKER_") and "__" in name for name in os.environ):
        raise ConfigError(NOTHING_CONFIGURED)
    return config.load(None, os.environ, flags or {})


def _serve(arguments: argparse.Namespace) -> int:
    flags: dict[str, Any] = {}
    server = {"listen": arguments.listen, "workers": arguments.workers}
    flags["server"] = {name: value for name, value in server.items() if value}
    if arguments.admin_listen:
        flags["admin"] = {"listen": arguments.admin_listen}
    if not arguments.dev:
        return _run(lambda: _settings(arguments, flags), dev=False)
    from broker.app import dev  # noqa: PLC0415 - only here

    made = dev.DevSecrets()
    path = config.find_file(arguments.config, os.environ) if _names_file(arguments) else None
    return _run(
        lambda: made.complete(config.load(path, os.environ, flags, made.defaults())), dev=True
    )


def _names_file(arguments: argparse.Namespace) -> bool:
    """Development mode reads a file only if one is named, never the packaged one."""
    return bool(arguments.config or os.environ.get("BROKER_CONFIG"))


def _run(load: Callable[[], Settings], *, dev: bool) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # a reload waits for the start
    from broker.process.serve import serve  # noqa: PLC0415 - as above
    from broker.telemetry import logs  # noqa: PLC0415 - the server's imports are slow and other commands need none

    settings = load()
    logs.configure(settings.log)
    _note_unused_key(settings)
    return serve(settings, load, dev=dev)


def _check(arguments: argparse.Namespace) -> int:
    from broker.app import factory, missing_secrets  # noqa: PLC0415 - as in _run

    settings = _settings(arguments)
    missing = missing_secrets.missing_files(settings)
    made_up = missing_secrets.fill_missing_secrets(
        settings, lambda _name: Secret(secrets.token_urlsafe(48))
    )
    factory.check(made_up, os.environ)
    for name, file in missing:
        complain(f"note: {name}: {file} is not here; it must be where the broker runs")
    _note_unused_key(settings)
    if factory.shows_password(settings):
        complain(
            "note: store.password crosses the network in clear text: write valkeys:// where others"
            " can listen"
        )
    tell("configuration ok")
    return EX_OK


def _note_unused_key(settings: Settings) -> None:
    """Say so when there is a vendor key and tokens are signed here all the same.

    The vendor's viewer takes none of those.
    """
    upstream = settings.issuer.upstream
    given = upstream.api_secret or upstream.api_secret_files
    if settings.issuer.kind == "local" and (
        given or any(os.environ.get(name) for name in config.VENDOR_VARIABLES)
    ):
        complain(
            'note: a vendor key is given but not used, because issuer.kind is "local" and tokens'
            ' are signed here; set issuer.kind = "upstream" to relay the vendor\'s'
        )


def _resolved(settings: Settings) -> dict[str, str]:
    """Say of keys that are left out what is used in their place."""
    notes = {}
    local, upstream = settings.issuer.local, settings.issuer.upstream
    if settings.issuer.kind == "local" and not local.signing_key and len(local.keys) == 1:
        notes["issuer.local.signing_key"] = f"the only key signs: {next(iter(local.keys))}"
    variable = next((name for name in config.VENDOR_VARIABLES if os.environ.get(name)), None)
    given = upstream.api_secret or upstream.api_secret_files
    if settings.issuer.kind == "upstream" and variable and not given:
        notes["issuer.upstream.api_secret"] = f"the key in {variable} is used"
    if settings.issuer.kind == "upstream" and not (upstream.proxy or upstream.proxy_file):
        from broker.app import factory  # noqa: PLC0415 - as in _run

        proxy = factory.vendor_proxy(settings, os.environ)
        if proxy is not None:
            notes["issuer.upstream.proxy"] = f"{proxy.source} is used"
    return notes


def _config_show(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    tell(schema.show(settings, _resolved(settings)).removesuffix("\n"))
    return EX_OK


def _mint(arguments: argparse.Namespace) -> int:
    from broker.cli import mint  # noqa: PLC0415 - as in _run

    try:
        if arguments.url:
            secret = os.environ.get("BROKER_API_SECRET", "")
            token = mint.ask(arguments.url, secret, arguments.agent, arguments.fingerprint)
        else:
            token = mint.sign(_settings(arguments), arguments.agent, arguments.fingerprint)
    except mint.CannotMint as error:
        complain(f"broker: {error}")
        match error:
            case mint.Misused():
                return EX_USAGE
            case mint.Refused():
                return EX_NO
            case _:
                return EX_UNAVAILABLE
    tell(mint.iframe(arguments.agent, token) if arguments.iframe else token)
    return EX_OK


def _doctor(arguments: argparse.Namespace) -> int:
    import structlog  # noqa: PLC0415 - as in _run

    from broker.cli import doctor  # noqa: PLC0415 - as in _run

    # what is rehearsed would be logged as if it were a broker's: the findings say it better
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    findings = doctor.examine(_settings(arguments), os.environ)
    for finding in findings:
        tell(str(finding))
    return EX_OK if all(finding.ok for finding in findings) else EX_NO


def _fake_vendor(arguments: argparse.Namespace) -> int:
    from broker.testing import FakeVendor, VendorSettings, serve_forever  # noqa: PLC0415 - as in _run

    try:
        where = validate.parse_address(arguments.listen)
    except ValueError as error:
        raise ConfigError(f"--listen: {error}") from None
    if isinstance(where, str):
        raise ConfigError("--listen: the fake vendor needs HOST:PORT")
    secret = os.environ.get("BITHUMAN_API_SECRET") or secrets.token_urlsafe(24)

    def introduce(vendor: FakeVendor) -> None:
        stdout.write(json.dumps({"url": vendor.url, "api_secret": secret}) + "\n")

    settings = VendorSettings(latency=arguments.latency)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C is how it is stopped
    try:
        asyncio.run(serve_forever(*where, started=introduce, settings=settings, secrets=[secret]))
    except KeyboardInterrupt:
        return EX_OK
    except OSError as error:
        complain(f"broker: --listen: cannot listen on {arguments.listen}: {error.strerror}")
        return EX_UNAVAILABLE
    return EX_OK


def _verify(arguments: argparse.Namespace) -> int:
    from broker.app import factory  # noqa: PLC0415 - as in _run
    from broker.clock import SystemClock  # noqa: PLC0415 - as in _run
    from broker.issuers.keyring import BadToken  # noqa: PLC0415 - as in _run

    settings = _settings(arguments)
    local = settings.issuer.local
    try:
        proof = factory.keyring(settings).verify(
            sys.stdin.buffer.read(MAX_FILE).decode("utf-8", "replace").strip(),
            local.issuer,
            local.audience,
            SystemClock().wall(),
        )
    except BadToken as error:
        complain(f"not valid: {error}")
        return EX_NO
    tell(json.dumps(dict(proof.claims), indent=2))
    return EX_OK


def _store_acl(arguments: argparse.Namespace) -> int:
    from broker.config.addresses import parse_store_url  # noqa: PLC0415 - as in _run
    from broker.valkey.client.scripts import acl_line  # noqa: PLC0415 - as in _run

    path = config.find_file(arguments.config, os.environ)
    settings = Settings() if path is None else config.load(path, os.environ, {})
    user = arguments.user or settings.store.username or "broker"
    if not user.isprintable() or " " in user:
        raise ConfigError("--user: a name without blanks, as the server's ACL file has it")
    address = parse_store_url(settings.store.url)
    cluster, database = (False, False) if address is None else (address.cluster, address.db > 0)
    tell(acl_line(user, ">PASSWORD", cluster=cluster, database=database))
    return EX_OK


def _keys_generate(arguments: argparse.Namespace) -> int:
    key = secrets.token_urlsafe(32)
    if not arguments.out:
        tell(key)
        return EX_OK
    try:
        handle = os.open(arguments.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        complain(f"broker: cannot write {arguments.out}: {error.strerror}")
        return EX_NO
    with os.fdopen(handle, "w") as file:
        file.write(key + "\n")
    return EX_OK


def _healthcheck(arguments: argparse.Namespace) -> int:
    from broker.cli import healthcheck  # noqa: PLC0415 - as in _run

    file = config.find_file(arguments.config, os.environ)
    problem = healthcheck.ask(healthcheck.where(arguments.admin_listen, os.environ, file))
    if problem:
        complain(f"broker: {_one_line(problem)}")
        return EX_NO
    return EX_OK


def _keys_list(arguments: argparse.Namespace) -> int:
    from broker.cli import keys  # noqa: PLC0415 - as in _run

    tell("\n".join(keys.listing(_settings(arguments))))
    return EX_OK


def _keys_rotate(arguments: argparse.Namespace) -> int:
    from broker.cli import keys  # noqa: PLC0415 - as in _run

    after = arguments.after.us // 1_000_000
    try:
        lines = keys.rotate(_settings(arguments), after, drop_old=arguments.drop_old)
    except keys.CannotRotate as error:
        complain(f"broker: {_one_line(error)}")
        return EX_NO
    tell("\n".join(lines))
    return EX_OK


if __name__ == "__main__":
    sys.exit(main())
