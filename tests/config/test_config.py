"""From file, environment and flags to settings: who wins, and what an operator is told."""

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import fields
from processes import Tree, good, merged, put, toml, write

from broker.config import load as config
from broker.config import schema, validate
from broker.config.schema import ConfigError
from broker.config.settings import Duration, Settings
from broker.model import Secret
from broker.units import SECOND
from broker.valkey.leases import LEASE, RENEWAL

Value = str | int | float | bool | list[str]


def refusal(tree: Mapping[str, Any]) -> str:
    """Return what the operator is told about a tree that cannot be used."""
    with pytest.raises(ConfigError) as caught:
        config.from_tree(tree)
    return str(caught.value)


def keys(kind: type[Struct] = Settings, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every single value of the tree by its path; tables with free names are given one."""
    for field in fields(kind):
        bare = schema.bare(field.type)
        here = (*path, field.name)
        if get_origin(bare) in (dict, Mapping):
            yield from keys(get_args(bare)[1], (*here, "A78WKV4515"))
        elif isinstance(bare, type) and issubclass(bare, Struct):
            yield from keys(bare, here)
        else:
            yield ".".join(here), bare


POOLS: Mapping[type, tuple[Value, ...]] = {
    str: (
        *("127.0.0.1:7001", "[::1]:7002", "https://a.example", "https://b.example", "/a/b", "/c/d"),
        *("valkey://a.example", "unix:///run/valkey.sock?db=3"),
    ),
    int: (4, 12, 1001, 2002, 3003, 40_004),
    float: (0.5, 7.25, 8, 901),
    bool: (False, True),
    Duration: ("900ms", "2s", "4s", "45s", "301s", "14m", "20m", "1h"),
    Secret: ("first-" * 8, "second-" * 8, "third-" * 8),
    tuple: ([], ["10.0.0.1"], ["10.0.0.0/8", "fd00::/8"], ["*"], ["A1", "B2"], ["/v1/*", "/v2/a"]),
}
"""Values to try for a setting of a type; those that its rules refuse are left out."""


def alone(dotted: str, value: object) -> Settings:
    """Return the settings with one key set, and what that key needs beside it."""
    return config.from_tree(put(beside(dotted), dotted, value))


def beside(dotted: str) -> Tree:
    """Return what some keys cannot do without."""
    key = {} if dotted.startswith("store.encryption_key") else {"encryption_key_file": "/key"}
    if dotted == "server.workers":
        key["url"] = "valkey://store.example"
    if dotted == "store.tls_key_file":
        key["tls_cert_file"] = "/cert"
    tree: Tree = {"store": key, "limits": {"client": {"rate": 5, "burst": 5}}}
    if dotted.endswith("pass_through"):
        tree["issuer"] = {"kind": "upstream", "upstream": {"pass_through": ["/v1/agents"]}}
    return tree


def candidates(dotted: str, kind: Any) -> list[Value]:
    """Values that this key takes."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if get_origin(kind) is Union:  # "auto" or a number
        return [*get_args(get_args(kind)[0]), 3, 12]
    pool = POOLS[kind if isinstance(kind, type) and kind in POOLS else get_origin(kind)]
    taken: list[Value] = []
    for value in pool:
        try:
            alone(dotted, value)
        except ConfigError:
            continue
        taken.append(value)
    return taken


def as_variable(dotted: str, draw: st.DrawFn) -> str:
    """Name a key's variable, in any case; free names keep theirs."""
    upper = draw(st.booleans())
    parts = [p if p == "A78WKV4515" else p.upper() if upper else p for p in dotted.split(".")]
    return "BROKER_" + "__".join(parts)


def as_text(value: Value, draw: st.DrawFn) -> str:
    """Write a value as an environment variable can hold it."""
    if isinstance(value, bool):
        return draw(st.sampled_from(["true", "1"] if value else ["false", "0"]))
    if isinstance(value, list):
        return str(value).replace("'", '"') if draw(st.booleans()) else ", ".join(value)
    return str(value)


@contextmanager
def file_with(tree: Tree) -> Iterator[Path]:
    """Write a configuration for the time of one look."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(write(Path(folder) / "broker.toml", toml(tree)))


class TestPrecedence:
    @pytest.mark.parametrize(("dotted", "kind"), list(keys()))
    def test_is_flag_environment_file_default_for_every_key(self, dotted: str, kind: Any) -> None:
        """Whatever of the four says something, the first of them that does decides."""
        taken = candidates(dotted, kind)
        assert len({str(value) for value in taken}) > 1, f"no values to try {dotted} with"
        value = st.sampled_from(taken)

        @profile(max_examples=12, deadline=None)
        @given(sources=st.tuples(*[st.none() | value] * 4), data=st.data())
        def first_decides(sources: tuple[Value | None, ...], data: st.DataObject) -> None:
            flag, variable, file, default = sources
            environ = {}
            if variable is not None:
                draw: Any = data.draw
                environ[as_variable(dotted, draw)] = as_text(variable, draw)
            base = beside(dotted)
            with file_with({} if file is None else put({}, dotted, file)) as path:
                loaded = config.load(
                    path,
                    environ,
                    {} if flag is None else put({}, dotted, flag),
                    base if default is None else put(base, dotted, default),
                )
            said = [source for source in sources if source is not None]
            assert loaded == (alone(dotted, said[0]) if said else config.from_tree(base))

        first_decides()

    def test_of_a_secret_and_its_file_goes_to_the_later_source(self, tmp_path: Path) -> None:
        """They are two forms of one setting: the environment's secret replaces the file's."""
        tree = good(tmp_path)
        inline = secrets.token_urlsafe(32)
        path = Path(write(tmp_path / "broker.toml", toml(tree)))
        client = config.load(path, {"BROKER_CLIENTS__WEB__SECRET": inline}, {}).clients["web"]
        assert (client.secret, client.secret_file) == (Secret(inline), None)
        assert client.agents == ("*",)

        write(path, toml(put(tree, "clients.web", {"secret": inline, "agents": ["*"]})))
        client = config.load(path, {"BROKER_CLIENTS__WEB__SECRET_FILE": "/x"}, {}).clients["web"]
        assert (client.secret, client.secret_file) == (None, "/x")

    def test_of_vendor_keys_goes_to_the_later_source(self, tmp_path: Path) -> None:
        """The same for a secret that may come in several files."""
        tree = put(good(tmp_path), "issuer.upstream.api_secret_files", ["/a", "/b"])
        path = Path(write(tmp_path / "broker.toml", toml(tree)))
        inline = secrets.token_urlsafe(32)
        environ = {"BROKER_ISSUER__UPSTREAM__API_SECRET": inline}
        upstream = config.load(path, environ, {}).issuer.upstream
        assert (upstream.api_secret, upstream.api_secret_files) == (Secret(inline), ())

    def test_within_one_source_two_forms_are_an_error(self, tmp_path: Path) -> None:
        """Nobody can say which of them was meant."""
        environ = {"BROKER_CLIENTS__WEB__SECRET": "a", "BROKER_CLIENTS__WEB__SECRET_FILE": "/b"}
        with pytest.raises(ConfigError) as caught:
            config.load(None, environ, {})
        both = "BROKER_CLIENTS__WEB__SECRET and BROKER_CLIENTS__WEB__SECRET_FILE"
        assert str(caught.value) == f"{both} are both set: keep one"

    def test_several_files_are_another_form_too(self) -> None:
        """One of the two keys would not be used, and nobody would be told."""
        name = "BROKER_ISSUER__UPSTREAM__API_SECRET"
        with pytest.raises(ConfigError, match=f"^{name} and {name}_FILES are both set: keep one$"):
            config.load(None, {name: "a", f"{name}_FILES": "/b"}, {})

    def test_leaves_sources_as_they_were(self, tmp_path: Path) -> None:
        """Merging copies: the defaults can be used for the next reload."""
        defaults: Tree = {"clients": {"dev": {"secret": "s" * 20, "agents": ["*"]}}}
        before = repr(defaults)
        config.load(None, {"BROKER_CLIENTS__DEV__SECRET_FILE": "/x"}, {}, defaults)
        assert repr(defaults) == before


class TestEnvironment:
    @pytest.mark.parametrize(
        ("text", "agents"),
        [
            ("*", ("*",)),
            ("A1,B2", ("A1", "B2")),
            (" A1 , B2, ", ("A1", "B2")),
            ('["A1", "B2"]', ("A1", "B2")),
            ("", ()),
            ("[]", ()),
        ],
    )
    def test_writes_lists_with_commas_or_as_toml(self, text: str, agents: tuple[str, ...]) -> None:
        """Both ways mean the same list."""
        loaded = config.load(None, {"BROKER_CLIENTS__WEB__AGENTS": text}, {})
        assert loaded.clients["web" if "web" in loaded.clients else "WEB"].agents == agents

    def test_finds_sections_and_keys_without_regard_to_case(self, tmp_path: Path) -> None:
        """An entry of the file is changed, not doubled, whatever the case of the variable."""
        path = Path(write(tmp_path / "f", toml({"clients": {"Web-1": {"agents": ["A1"]}}})))
        for variable in ("BROKER_CLIENTS__WEB-1__AGENTS", "BROKER_clients__web-1__agents"):
            loaded = config.load(path, {variable: "B2"}, {})
            assert {n: c.agents for n, c in loaded.clients.items()} == {"Web-1": ("B2",)}

    def test_makes_entries_of_tables(self) -> None:
        """A client, a key and an agent's exception can come from the environment alone."""
        loaded = config.load(
            None,
            {
                "BROKER_CLIENTS__shop__SECRET_FILE": "/a",
                "BROKER_ISSUER__LOCAL__KEYS__2026-11__SECRET_FILE": "/b",
                "BROKER_LIMITS__AGENT__OVERRIDES__A78WKV4515__RATE": "5",
                "BROKER_ISSUER__BUDGET__BURST": "3",
            },
            {},
        )
        assert loaded.clients["shop"].secret_file == "/a"
        assert loaded.issuer.local.keys["2026-11"].secret_file == "/b"
        assert loaded.limits.agent.overrides["A78WKV4515"].rate == 5
        assert loaded.issuer.budget is not None
        assert (loaded.issuer.budget.burst, loaded.issuer.budget.rate) == (3, 106)

    def test_counts_only_with_a_double_underscore(self) -> None:
        """BROKER_CONFIG and what a container platform adds (BROKER_PORT) are no settings."""
        environ = {"BROKER_CONFIG": "x", "BROKER_PORT": "tcp://10.0.0.1:80", "HOME": "/"}
        assert config.load(None, environ, {}) == Settings()

    @pytest.mark.parametrize(
        ("variable", "told"),
        [
            (
                "BROKER_SERVER__LISEN",
                "BROKER_SERVER__LISEN: unknown key server.lisen: did you mean 'listen'?",
            ),
            (
                "BROKER_SERVR__LISTEN",
                "BROKER_SERVR__LISTEN: unknown key servr: did you mean 'server'?",
            ),
            (
                "BROKER_SERVER__LISTEN__PORT",
                "BROKER_SERVER__LISTEN__PORT: server.listen is not a section",
            ),
        ],
    )
    def test_is_named_when_it_is_wrong(self, variable: str, told: str) -> None:
        """The operator looks for the variable, not in the file."""
        with pytest.raises(ConfigError) as caught:
            config.load(None, {variable: "x"}, {})
        assert str(caught.value) == told

    def test_cannot_enter_what_is_no_section(self, tmp_path: Path) -> None:
        """A file that says `server = 5` and a variable inside it do not go together."""
        path = Path(write(tmp_path / "f", "server = 5\n"))
        with pytest.raises(ConfigError) as caught:
            config.load(path, {"BROKER_SERVER__LISTEN": "x"}, {})
        assert str(caught.value) == "BROKER_SERVER__LISTEN: server is not a section"


class TestOverridden:
    """Keys of the file that a variable replaces, whether by another value or another form."""

    @pytest.mark.parametrize(
        ("variables", "expected"),
        [
            ({"BROKER_SERVER__DEADLINE": "7s"}, {"server.deadline"}),
            ({"broker_server__deadline": "7s"}, set()),
            ({"BROKER_server__deadline": "7s"}, {"server.deadline"}),
            ({"BROKER_SERVER__DEADLINE": "5s"}, set()),
            ({"BROKER_SERVER__DRAIN": "7s"}, set()),
            ({"BROKER_CLIENTS__SHOP__SECRET": "x" * 20}, {"clients.Shop.secret_file"}),
            ({"BROKER_CLIENTS__WEB__SECRET_FILE": "/b"}, set()),
            ({"BROKER_SERVER__TRUSTED_PROXIES": "10.0.0.1"}, set()),
            ({"BROKER_SERVER__TRUSTED_PROXIES": "10.0.0.2"}, {"server.trusted_proxies"}),
            ({"BROKER_ISSUER__UPSTREAM__API_SECRET": "k"}, {"issuer.upstream.api_secret_files"}),
            ({"BITHUMAN_API_SECRET": "k", "BROKER_CONFIG": "/c"}, set()),
        ],
    )
    def test_are_named_with_their_variable(
        self, variables: dict[str, str], expected: set[str]
    ) -> None:
        """Not what the file does not say, nor what both say."""
        tree: Tree = {
            "server": {"deadline": "5s", "trusted_proxies": ["10.0.0.1"]},
            "clients": {"Shop": {"secret_file": "/a"}},
            "issuer": {"upstream": {"api_secret_files": ["/k"]}},
        }
        with file_with(tree) as path:
            found = config.overridden(path, variables)
        assert found == dict.fromkeys(expected, next(iter(variables)))

    def test_without_a_file_there_is_none(self) -> None:
        """The environment alone overrides nothing."""
        assert config.overridden(None, {"BROKER_SERVER__DEADLINE": "7s"}) == {}


class TestUnknownKeys:
    @pytest.mark.parametrize("dotted", [name for name, _ in keys()])
    def test_are_refused_with_the_nearest_right_one_at_every_depth(self, dotted: str) -> None:
        """One letter too many, in any key of the tree, names the key and its right spelling."""
        above, _, name = dotted.rpartition(".")
        wrong = f"{name}x"
        path = f"{above}.{wrong}" if above else wrong
        assert refusal(put({}, path, 1)) == f"unknown key {path}: did you mean {name!r}?"

    def test_name_what_there_is_when_nothing_is_near(self) -> None:
        """A list of the right ones is better than nothing."""
        told = "unknown key admin.zzz: known: listen, secret, secret_file"
        assert refusal({"admin": {"zzz": 1}}) == told


NOWHERE = (
    " is neither an address nor a network, such as 10.0.0.1 or 10.0.0.0/8 (no bits set behind the"
    " prefix)"
)
NO_RATE = "rate must be a positive, finite number"
NO_BURST = "burst must be between 1 and 2147483647"
NO_OFF = "; no number switches a limit off: raise it, or set dry_run = true"
NO_UNIT = 'a duration needs a number and a unit (us, ms, s, m, h), such as "12s"'
KEEP_ALIVE = (
    "must be 1s to 1h; set it some seconds longer than the balancer in front keeps an idle"
    " connection"
)
STORE_TIMEOUT = (
    "must be 10ms to 2s; a server nearby takes less than 1ms, so put it nearer if it needs more"
)
NO_ADDRESS = 'expected "HOST:PORT" (0 chooses a port) or "unix:/path"'
RATES = ("limits.fingerprint", "limits.fingerprint_mints", "limits.agent", "issuer.budget")

WRONG: list[tuple[str, object, str]] = [
    ("server", "x", "server: expected a table, got str"),
    ("server.listen.port", 1, "server.listen: expected str, got a table"),
    ("clients", [], "clients: expected a table, got a list"),
    ("server.listen", 5, "server.listen: expected str, got int"),
    ("server.docs", "maybe", "server.docs: expected bool, got str"),
    ("clients.web.agents", "*", "clients.web.agents: expected a list, got str"),
    (
        "clients.web.agents",
        ["a b"],
        "clients.web.agents: 'a b' is neither \"*\" nor an agent id (1 to 64 of A-Z a-z 0-9 _ -)",
    ),
    ("clients.web.secret", 5, "clients.web.secret: a secret is text"),
    ("clients.a b.agents", [], "clients: expected names matching '^[A-Za-z0-9_.-]{1,64}$'"),
    ("limits.agent.burst", True, "limits.agent.burst: expected int, got bool"),
    ("limits.agent.rate", 10**400, "limits.agent.rate: number out of range"),
    ("limits.max_tracked", 1, "limits.max_tracked: expected int >= 1000"),
    ("reuse.max_tokens", 0, "reuse.max_tokens: expected int >= 1"),
    ("log.level", "loud", "log.level: must be debug or info or warning or error"),
    ("issuer.kind", "vendor", "issuer.kind: must be local or upstream"),
    ("limits.client.per", "1s", "limits.client: the table lacks the required field rate"),
    (
        "limits.agent.overrides.A B.rate",
        1,
        "limits.agent.overrides: 'A B' is not an agent id (1 to 64 of A-Z a-z 0-9 _ -)",
    ),
    (
        "limits.agent.overrides.A1.burst",
        "x",
        "limits.agent.overrides.A1.burst: expected int, got str",
    ),
    ("issuer.upstream.timeout", "0s", "issuer.upstream.timeout: must be longer than 0"),
    (
        "issuer.upstream.api_secret_files",
        [f"/{n}" for n in range(validate.MAX_VENDOR_KEYS + 1)],
        (
            f"issuer.upstream.api_secret_files: more than {validate.MAX_VENDOR_KEYS}; each refused"
            " key is tried twice a minute, and the vendor allows 30 failures"
        ),
    ),
    (
        "clients.web.agents",
        ["a" * 65],
        (
            f"clients.web.agents: '{'a' * 65}' is neither \"*\" nor an agent id"
            " (1 to 64 of A-Z a-z 0-9 _ -)"
        ),
    ),
    ("server.deadline", 12, f"server.deadline: {NO_UNIT}"),
    ("server.deadline", "12", f"server.deadline: {NO_UNIT}"),
    ("server.deadline", "12sec", f"server.deadline: {NO_UNIT}"),
    ("server.deadline", "-1s", f"server.deadline: {NO_UNIT}"),
    ("server.deadline", "1s\n", f"server.deadline: {NO_UNIT}"),
    ("server.deadline", "9" * 400 + "h", "server.deadline: a duration of more than a year"),
    ("server.deadline", "0s", "server.deadline: must be longer than 0"),
    ("server.keep_alive", "0s", f"server.keep_alive: {KEEP_ALIVE}"),
    ("server.keep_alive", "999ms", f"server.keep_alive: {KEEP_ALIVE}"),
    ("server.keep_alive", "3601s", f"server.keep_alive: {KEEP_ALIVE}"),
    ("server.keep_alive", 75, f"server.keep_alive: {NO_UNIT}"),
    (
        "server.drain_lead",
        "16s",
        "server.drain_lead: must not be longer than server.drain; raise drain or lower drain_lead",
    ),
    ("store.timeout", "2001ms", f"store.timeout: {STORE_TIMEOUT}"),
    ("store.timeout", "9ms", f"store.timeout: {STORE_TIMEOUT}"),
    ("store.replicas", "many", 'store.replicas: must be "auto", or a whole number from 1'),
    ("store.replicas", 0, 'store.replicas: must be "auto", or a whole number from 1'),
    ("reuse.floor_in_outage", "6m", "reuse.floor_in_outage: must not be longer than reuse.floor"),
    ("reuse.refresh_ahead", "4m", "reuse.refresh_ahead: must not be shorter than reuse.floor"),
    ("issuer.budget.max_wait", "0s", "issuer.budget.max_wait: must be longer than 0"),
    ("server.trusted_proxies", ["10.0.0.300"], f"server.trusted_proxies: '10.0.0.300'{NOWHERE}"),
    ("server.trusted_proxies", ["10.0.0.1/8"], f"server.trusted_proxies: '10.0.0.1/8'{NOWHERE}"),
    ("server.trusted_proxies", ["proxy"], f"server.trusted_proxies: 'proxy'{NOWHERE}"),
    *[
        (f"{section}.listen", text, f"{section}.listen: {NO_ADDRESS}")
        for section in ("server", "admin")
        for text in (
            "",
            "8080",
            ":8080",
            "localhost",
            "localhost:",
            "h:99999",
            "h:-1",
            "h:²",
            "[]:1",
        )
    ],
    (
        "server.listen",
        "::1:80",
        'server.listen: an IPv6 address needs brackets, such as "[::1]:8080"',
    ),
    *[
        (
            "server.listen",
            text,
            "server.listen: a Unix socket needs an absolute path, such as unix:/run/broker.sock",
        )
        for text in ("unix:", "unix:broker.sock", "unix:/a\0b", "unix:/a\nb")
    ],
    *[
        (f"{limit}.{key}", value, f"{limit}: {rule}{NO_OFF}")
        for limit in RATES
        for key, value, rule in (
            ("rate", 0, NO_RATE),
            ("rate", -1, NO_RATE),
            ("rate", float("nan"), NO_RATE),
            ("rate", float("inf"), NO_RATE),
            ("rate", "nan", NO_RATE),
            ("burst", 0, NO_BURST),
            ("burst", -1, NO_BURST),
            ("burst", 2**40, NO_BURST),
            ("per", "0s", "per must be longer than 0"),
            ("rate", 1e12, "rate must not exceed 1000000 a second"),
            ("rate", 5e-324, "rate is too low for this burst: it would take ages to refill"),
        )
    ],
    ("limits.agent.overrides.A1.rate", 0, f"limits.agent.overrides.A1: {NO_RATE}{NO_OFF}"),
    ("limits.agent.overrides.A1.burst", 0, f"limits.agent.overrides.A1: {NO_BURST}{NO_OFF}"),
    *(
        (
            f"store.{name}",
            value,
            (
                f"store.{name}: is gone: state is kept in a file as it changes, not at the end;"
                ' take it out, and set store.url = "sqlite:///var/lib/embed-token-broker/state.db"'
            ),
        )
        for name, value in (("snapshot_file", "/x"), ("snapshot_max_age", "1m"))
    ),
    *(
        (
            "store.url",
            url,
            (
                "store.url: a state file needs an absolute path:"
                " sqlite:///var/lib/embed-token-broker/state.db"
            ),
        )
        for url in (
            "sqlite:",
            "sqlite://",
            "sqlite://state.db",
            "sqlite:////etc/x",
            "sqlite:///folder/",
            "sqlite:///a?mode=ro",
            "sqlite:///a/../b",
            "sqlite:///a\nb",
        )
    ),
]

JUST_GOOD: list[tuple[str, object]] = [
    ("server.deadline", "1us"),
    ("server.keep_alive", "1s"),
    ("server.keep_alive", "1h"),
    ("server.drain_lead", "15s"),
    ("server.listen", "h:65535"),
    ("server.listen", "h:0"),
    ("store.timeout", "10ms"),
    ("store.timeout", "2s"),
    ("store.replicas", 1),
    ("reuse.floor_in_outage", "5m"),
    ("reuse.refresh_ahead", "5m"),
    ("reuse.max_tokens", 1),
    ("limits.max_tracked", 1000),
    ("limits.agent.burst", 1),
    ("limits.agent.burst", 2**31 - 1),
    ("limits.agent.overrides.A1.burst", 1),
    ("issuer.budget.max_wait", "1us"),
    ("issuer.upstream.timeout", "1us"),
    ("issuer.upstream.api_secret_files", [f"/{n}" for n in range(validate.MAX_VENDOR_KEYS)]),
    ("clients.web.agents", ["a" * 64]),
]
"""Values on the good side of each bound; the defaults are drain 15 s, floors of 5 min."""


class TestRefusals:
    @pytest.mark.parametrize(("dotted", "value", "told"), WRONG)
    def test_L8_name_key_rule_and_remedy(self, dotted: str, value: object, told: str) -> None:
        """One line, which begins with the key that is wrong: the whole line, for each kind."""
        if dotted == "limits.agent.overrides.A B.rate":
            tree: Tree = {"limits": {"agent": {"overrides": {"A B": {"rate": value}}}}}
        else:
            tree = put({}, dotted, value)
        assert refusal(tree) == told

    @pytest.mark.parametrize(("dotted", "value"), JUST_GOOD)
    def test_L8_begin_behind_the_bound(self, dotted: str, value: object) -> None:
        """What a rule names as the least, or as the most, is good."""
        assert list(config.examine_tree(put({}, dotted, value)).problems) == []

    @pytest.mark.parametrize(
        ("data", "admin", "clash"),
        [
            ("127.0.0.1:8080", "127.0.0.1:8080", True),
            ("127.0.0.1:8080", "127.0.0.1:8081", False),
            ("127.0.0.1:8080", "127.0.0.2:8080", False),
            ("[::]:8080", "127.0.0.1:8080", True),
            ("127.0.0.1:8080", "0.0.0.0:8080", True),
            ("[::]:0", "[::]:0", False),
            ("[::]:8080", "unix:/run/admin.sock", False),
            ("unix:/run/a.sock", "unix:/run/a.sock", True),
            ("unix:/run/a.sock", "unix:/run/b.sock", False),
        ],
    )
    def test_N7_of_two_listeners_in_one_place(self, data: str, admin: str, *, clash: bool) -> None:
        """A port of every address is taken for each of them; port 0 is never the same."""
        found = config.examine_tree({"server": {"listen": data}, "admin": {"listen": admin}})
        told = f"admin.listen: {admin} is taken by server.listen ({data}); choose another port"
        assert [str(problem) for problem in found.problems] == [told] * clash

    @pytest.mark.parametrize(
        ("budget", "most", "lower"),
        [
            ({"rate": 112, "burst": 8}, 120, ""),
            ({"rate": 113, "burst": 8}, 121, "set rate to 112 or less"),
            ({"rate": 1, "burst": 120}, 121, "set burst below 120"),
            ({"rate": 1, "burst": 500}, 501, "set burst below 120"),
            ({"rate": 226, "per": "120s", "burst": 8}, 121, "set rate to 224 or less"),
            ({"rate": 30, "burst": 8, "window": 37}, 38, "set rate to 29 or less"),
            ({"rate": 30, "burst": 8, "window": 38}, 38, ""),
        ],
    )
    def test_V10_of_a_budget_that_the_vendor_does_not_take(
        self, budget: dict[str, object], most: int, lower: str
    ) -> None:
        """What is the most in a minute, and the one number that would be right."""
        tree = {"issuer": {"kind": "upstream", "budget": budget}}
        told = [str(problem) for problem in config.examine_tree(tree).problems]
        assert len(told) == bool(lower)
        for text in told:
            assert f"are {most} calls, and the vendor takes {budget.get('window', 120)}" in text
            assert f": {lower}, or window = {most} if" in text

    def test_of_routes_that_are_passed_on(self) -> None:
        """A route that is none, routes without a vendor, and clients without a route."""
        upstream = {"pass_through": ["v1/agent"]}
        found = config.examine_tree({"issuer": {"kind": "upstream", "upstream": upstream}})
        (problem,) = found.problems
        assert problem.key == "issuer.upstream.pass_through"
        upstream = {"pass_through": ["/v1/agent/*"]}
        (problem,) = config.examine_tree({"issuer": {"upstream": upstream}}).problems
        assert (problem.key, "no vendor" in str(problem)) == ("issuer.upstream.pass_through", True)
        client = {"agents": ["*"], "pass_through": True}
        (problem,) = config.examine_tree({"clients": {"web": client}}).problems
        assert problem.key == "clients.web.pass_through"
        tree: Tree = {
            "clients": {"web": client},
            "issuer": {"kind": "upstream", "upstream": upstream},
        }
        assert list(config.examine_tree(tree).problems) == []

    def test_L8_of_a_client_limit_are_the_same(self) -> None:
        """The limit that is off by default is held to the same rules."""
        tree = {"limits": {"client": {"rate": 0, "burst": 1}}}
        assert refusal(tree) == f"limits.client: {NO_RATE}{NO_OFF}"

    def test_never_quote_a_secret(self) -> None:
        """G7: what stands in the place of a secret may be one."""
        canary = secrets.token_urlsafe(24)
        wrong: list[Tree] = [
            {"clients": {"web": canary}},
            {"clients": {"web": {"secret": [canary]}}},
            {"issuer": {"local": {"keys": {"a": canary}}}},
            {"store": {"encryption_key": {"x": canary}}},
        ]
        assert [tree for tree in wrong if canary in refusal(tree)] == []


class TestFile:
    @pytest.mark.parametrize(
        ("content", "told"),
        [
            (b"[server\n", "{} is not valid TOML: Expected ']' at the end of a table declaration"),
            (b"a = 1\na = 2\n", "{} is not valid TOML: Cannot overwrite a value"),
            (b"a = " + b"9" * 5000, "{} is not valid TOML: Exceeds the limit"),
            (b"a = " + b"[" * 5000, "{} is not valid TOML: "),
            (b"\xff\xfe", "cannot read {}: not UTF-8"),
        ],
        ids=["syntax", "twice", "digits", "depth", "bytes"],
    )
    def test_that_is_not_toml_is_named(self, tmp_path: Path, content: bytes, told: str) -> None:
        """File and reason, with the line where the parser knows it."""
        path = tmp_path / "broker.toml"
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            config.load(path, {}, {})
        assert str(caught.value).startswith(told.format(path))

    def test_N8_a_byte_order_mark_is_no_part_of_it(self, tmp_path: Path) -> None:
        """Editors put one before text: neither the first section nor a secret begins with it."""
        secret = secrets.token_urlsafe(24)
        (tmp_path / "web").write_text(secret + "\r\n", encoding="utf-8-sig")
        path = tmp_path / "broker.toml"
        text = f'[server]\nlisten = "[::]:1"\n[clients.web]\nsecret_file = "{tmp_path / "web"}"\n'
        path.write_text(text, encoding="utf-8-sig")
        settings = config.load(path, {}, {})
        assert settings.server.listen == "[::]:1"
        found = config.read_secret("clients.web.secret", None, settings.clients["web"].secret_file)
        assert found == Secret(secret)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            (
                "nowhere",
                "No such file or directory; `broker init` makes one, --config names another",
            ),
            ("", "a directory; name a file in it"),
            ("a\0b", "not a path"),
        ],
    )
    def test_that_cannot_be_read_is_named(self, tmp_path: Path, name: str, reason: str) -> None:
        """The configuration that was asked for and is not there is an error, not a default."""
        path = tmp_path / name
        with pytest.raises(ConfigError) as caught:
            config.load(path, {}, {})
        assert str(caught.value) == f"cannot read {path}: {reason}"

    def test_that_may_not_be_read_is_named(self, tmp_path: Path) -> None:
        """Permission denied, for the configuration and for a secret."""
        path = tmp_path / "broker.toml"
        path.write_text("", encoding="utf-8")
        path.chmod(0)
        with as_nobody(), pytest.raises(ConfigError) as caught:
            config.load(path, {}, {})
        told = (
            f"cannot read {path}: Permission denied; let the broker's user read it, or let the"
            " unit hand it over (LoadCredential)"
        )
        assert str(caught.value) == told
        with as_nobody(), pytest.raises(ConfigError) as caught:
            config.read_secret("clients.web.secret", None, str(path))
        assert str(caught.value) == f"clients.web.secret_file: {told}"

    def test_is_chosen_by_flag_then_variable_then_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`--config`, BROKER_CONFIG, and the packaged place if there is something in it."""
        packaged = tmp_path / "packaged.toml"
        monkeypatch.setattr(config, "DEFAULT_PATH", packaged)
        environ = {"BROKER_CONFIG": "/from/variable"}
        assert config.find_file("/from/flag", environ) == Path("/from/flag")
        assert config.find_file(None, environ) == Path("/from/variable")
        assert config.find_file(None, {"BROKER_CONFIG": ""}) is None
        packaged.touch()
        assert config.find_file(None, {}) == packaged


@contextmanager
def as_nobody() -> Iterator[None]:
    """Do without the rights of root, where the tests run with them."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


class TestSecretFile:
    @pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
    def test_may_end_with_one_line_end(self, tmp_path: Path, ending: str) -> None:
        """Editors and `echo` add one; it is not part of the secret."""
        secret = secrets.token_urlsafe(24)
        path = tmp_path / "secret"
        path.write_bytes(f"{secret}{ending}".encode())
        found = config.read_secret("x", None, str(path))
        assert found is not None
        assert found.reveal() == secret

    @pytest.mark.parametrize("content", ["", "\n", "\r\n"])
    def test_must_not_be_empty(self, tmp_path: Path, content: str) -> None:
        """An empty secret would be known to everybody."""
        path = tmp_path / "secret"
        path.write_bytes(content.encode())
        with pytest.raises(ConfigError) as caught:
            config.read_secret("clients.web.secret", None, str(path))
        assert str(caught.value) == f"clients.web.secret_file: {path} is empty"

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (lambda path: path, "No such file or directory"),
            (lambda path: path.parent, "a directory; name a file in it"),
            (lambda path: path.write_bytes(b"\xff") and path, "not UTF-8"),
            (lambda path: f"{path}\0", "not a path"),
        ],
        ids=["absent", "folder", "bytes", "nul"],
    )
    def test_that_cannot_be_read_is_named(
        self, tmp_path: Path, make: Callable[[Path], object], reason: str
    ) -> None:
        """Setting, file and reason."""
        path = str(make(tmp_path / "secret"))
        with pytest.raises(ConfigError) as caught:
            config.read_secret("store.encryption_key", None, path)
        assert str(caught.value) == f"store.encryption_key_file: cannot read {path}: {reason}"

    def test_and_the_secret_itself_are_one_too_many(self) -> None:
        """In one file, both forms are an error."""
        with pytest.raises(ConfigError) as caught:
            config.read_secret("clients.web.secret", Secret("x" * 20), "/x")
        told = "clients.web.secret and clients.web.secret_file are both set: keep one"
        assert str(caught.value) == told

    def test_unset_is_no_secret(self) -> None:
        """Neither form: None, for the caller to judge."""
        assert config.read_secret("x", None, None) is None


class TestShow:
    def test_prints_what_can_be_read_again(self, tmp_path: Path) -> None:
        """The output is a configuration file that means the same, but for the masked secrets."""
        tree = merged(
            good(tmp_path),
            {
                "limits.agent.overrides.A1": {"rate": 5.5},
                "limits.client": {"rate": 1, "burst": 2},
                "issuer.budget.burst": 3,
                "server.trusted_proxies": ["10.0.0.0/8"],
                "issuer.upstream.timeout": "1001us",
            },
        )
        tree["clients"]["wei.rd"] = {"secret_file": '/a"b', "agents": []}
        settings = config.from_tree(tree)
        path = Path(write(tmp_path / "shown.toml", schema.show(settings)))
        assert config.load(path, {}, {}) == settings

    def test_says_what_an_override_inherits(self) -> None:
        """As comments with the value: what is left out of a file goes on following the limit."""
        overrides = {"A1": {"rate": 5.5}, "A2": {"per": "2m", "burst": 1, "dry_run": False}}
        tree = {"limits": {"agent": {"rate": 60, "dry_run": True, "overrides": overrides}}}
        shown = schema.show(config.from_tree(tree))
        tables = {text.partition("]")[0]: text.splitlines()[1:] for text in shown.split("\n[")}
        assert tables["limits.agent.overrides.A1"][:4] == [
            "rate = 5.5",
            '# per = "1m", inherited',
            "# burst = 1000, inherited",
            "# dry_run = true, inherited",
        ]
        assert tables["limits.agent.overrides.A2"][:4] == [
            "# rate = 60.0, inherited",
            'per = "2m"',
            "burst = 1",
            "dry_run = false",
        ]
        assert "inherited" not in "".join(tables["limits.agent"] + tables["limits.fingerprint"])

    def test_G7_masks_every_secret(self) -> None:
        """A canary in each place for a secret is not in the output, and all places are."""
        canary = secrets.token_urlsafe(32)
        names = [name for name, kind in keys() if kind is Secret]
        tree = merged({}, dict.fromkeys(names, canary))
        shown = schema.show(config.from_tree(tree))
        assert canary not in shown
        assert shown.count('= "**********"') == len(names) >= 4


class TestAddress:
    @pytest.mark.parametrize(
        ("text", "where"),
        [
            ("127.0.0.1:0", ("127.0.0.1", 0)),
            ("localhost:65535", ("localhost", 65535)),
            ("[::1]:8080", ("::1", 8080)),
            ("unix:/run/broker.sock", "/run/broker.sock"),
        ],
    )
    def test_is_host_and_port_or_a_path(self, text: str, where: object) -> None:
        """The three forms of a place to listen."""
        assert validate.parse_address(text) == where


def test_a_call_of_the_store_that_hangs_costs_no_lease() -> None:
    """The longest `store.timeout` ends before a lease does that was to be renewed with it."""
    assert validate.STORE_TIMEOUT_BOUNDS[1].us <= LEASE - RENEWAL * SECOND
