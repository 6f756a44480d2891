"""From settings to parts: what is read from files, and what is refused before anything is open."""

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from msgspec.structs import replace
from processes import Tree, good, merged, put, secret_file, secret_in, write
from servers import write_certificates
from test_config import alone, keys
from web.edge import serving

from broker.app import credentials, factory, missing_secrets
from broker.app.secret_settings import secret_settings
from broker.config import load as config
from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.model import LimitName, Secret

NOTHING: Mapping[str, str] = {}


def settings(tree: Tree) -> Settings:
    """Check a tree."""
    return config.from_tree(tree)


def refusal(tree: Tree) -> str:
    """Return what the operator is told about parts that cannot be built."""
    with pytest.raises(ConfigError) as caught:
        factory.check(settings(tree), NOTHING)
    return str(caught.value)


def key_tree(path: str) -> Tree:
    """Return the table of keys with one key."""
    return {"one": {"secret_file": path}}


class TestClients:
    def test_are_known_by_the_digest_of_their_secret(self, tmp_path: Path) -> None:
        """Name, digest, agents (None for all) and the browser rule; the secret itself is gone."""
        tree = merged(
            good(tmp_path),
            {
                "clients.shop.secret_file": secret_file(tmp_path / "shop"),
                "clients.shop.agents": ["A1", "B2"],
                "clients.shop.allow_origin_header": True,
            },
        )
        web, shop = factory.clients(settings(tree), NOTHING)
        secret = secret_in(tree["clients"]["web"]["secret_file"])
        assert (web.name, web.agents, web.allow_origin) == ("web", None, False)
        assert (shop.name, shop.agents, shop.allow_origin) == ("shop", {"A1", "B2"}, True)
        assert web.digest == Secret(secret).digest() != shop.digest
        assert secret not in repr(web)

    def test_without_agents_may_use_none(self, tmp_path: Path) -> None:
        """Unset never means allowed."""
        tree = put(good(tmp_path), "clients.web.agents", [])
        assert factory.clients(settings(tree), NOTHING)[0].agents == frozenset()

    def test_none_at_all_is_refused(self, tmp_path: Path) -> None:
        """A broker that nobody may use is a mistake."""
        assert refusal(put(good(tmp_path), "clients", {})) == (
            "clients: nobody may ask for tokens; add [clients.NAME] with secret_file and agents"
        )

    def test_without_a_secret_are_refused(self, tmp_path: Path) -> None:
        """Nobody could be told from anybody."""
        tree = put(good(tmp_path), "clients.web", {"agents": ["*"]})
        told = "clients.web.secret_file: required; a client is known by its secret"
        assert refusal(tree) == told

    def test_with_a_short_secret_are_refused(self, tmp_path: Path) -> None:
        """15 characters are too few, 16 are enough."""
        tree = good(tmp_path)
        write(tmp_path / "web", secrets.token_hex(8)[:15] + "\n")
        assert refusal(tree) == (
            f"clients.web.secret_file: {tmp_path / 'web'}: shorter than 16 characters; make one"
            " with `broker keys generate`"
        )
        write(tmp_path / "web", secrets.token_hex(8) + "\n")
        factory.check(settings(tree), NOTHING)

    @pytest.mark.parametrize("spoil", ["{}\n\n", " {}", "{} ", "{}\nmore", "\t{}", "a\x00{}"])
    def test_with_a_secret_that_no_header_carries_are_refused(
        self, tmp_path: Path, spoil: str
    ) -> None:
        """A second line or a blank around it: no request could ever match it."""
        tree = good(tmp_path)
        write(tmp_path / "web", spoil.format(secrets.token_urlsafe(24)))
        assert refusal(tree) == (
            f"clients.web.secret_file: {tmp_path / 'web'}: has a line break, a control character or"
            " blanks around it, which no header can carry; keep it on one line"
        )

    def test_that_share_a_secret_are_refused(self, tmp_path: Path) -> None:
        """Secrets name clients: two with the same could not be told apart."""
        tree = good(tmp_path)
        path = tree["clients"]["web"]["secret_file"]
        tree = put(tree, "clients.shop", {"secret_file": path, "agents": ["A1"]})
        told = (
            f"clients.shop.secret_file: {path}: the same as that of 'web'; a client is known by its"
            " secret: make another one with `broker keys generate`"
        )
        assert refusal(tree) == told


class TestKeys:
    def test_none_at_all_is_refused(self, tmp_path: Path) -> None:
        """The remedy is a command, or the mode that needs none."""
        assert refusal(put(good(tmp_path), "issuer.local.keys", {})) == (
            "issuer.local.keys: no key to sign with; make one with `broker keys generate`, or try"
            " `broker serve --dev`"
        )

    def test_without_a_secret_are_refused(self, tmp_path: Path) -> None:
        """A table that names a key and does not have it."""
        tree = put(good(tmp_path), "issuer.local.keys", {"one": {}})
        assert refusal(tree) == "issuer.local.keys.one: needs secret_file"

    @pytest.mark.parametrize(
        ("make", "told"),
        [
            (
                lambda: secrets.token_urlsafe(32)[:31],
                "key 'one' has 31 bytes, at least 32 random ones are needed",
            ),
            (lambda: "k" * 64, "key 'one' repeats the same few bytes and is not random"),
            (lambda: "abcabc" * 10, "key 'one' repeats the same few bytes and is not random"),
        ],
        ids=["short", "one byte", "few bytes"],
    )
    @pytest.mark.parametrize("place", ["issuer.local.keys", "store"])
    def test_O2_that_are_weak_are_refused(
        self, tmp_path: Path, make: Callable[[], str], told: str, place: str
    ) -> None:
        """Below 32 bytes, or typed instead of drawn: nothing is signed or sealed with it."""
        path = write(tmp_path / "weak", make() + "\n")
        told += ": make one with `broker keys generate`"
        if place == "store":
            tree = put(good(tmp_path), "store.encryption_key_file", path)
            told = told.replace("'one'", "'store.encryption_key'")
            told = f"store.encryption_key_file: {path}: {told}"
        else:
            tree = put(good(tmp_path), "issuer.local.keys", key_tree(path))
            told = f"issuer.local.keys.one.secret_file: {path}: {told}"
        assert refusal(tree) == told

    def test_that_are_two_need_to_be_told_apart(self, tmp_path: Path) -> None:
        """With more than one, signing_key says which; and it has to be one of them."""
        path = secret_file(tmp_path / "two")
        tree = put(good(tmp_path), "issuer.local.keys.two.secret_file", path)
        told = "issuer.local.signing_key: required with more than one key"
        assert refusal(tree) == told
        wrong = put(tree, "issuer.local.signing_key", "three")
        assert refusal(wrong) == (
            "issuer.local.keys: signing_key names 'three', which is not among the keys"
        )
        right = put(tree, "issuer.local.signing_key", "two")
        assert credentials.keyring(settings(right)).signing(0) == "two"

    def test_that_are_one_need_no_name(self, tmp_path: Path) -> None:
        """The only key signs."""
        assert credentials.keyring(settings(good(tmp_path))).signing(0) == "one"


class TestSecretsInFiles:
    """An error names the setting that was used and its file: there may be a dozen."""

    @pytest.mark.parametrize("spoil", [" {}", "{}\n\n"], ids=["a blank before", "two newlines"])
    @pytest.mark.parametrize(
        "setting",
        [
            "admin.secret_file",
            "clients.web.secret_file",
            "clients.web.next_secret_file",
            "issuer.upstream.api_secret_files",
        ],
    )
    def test_that_no_header_carries_are_named(
        self, tmp_path: Path, setting: str, spoil: str
    ) -> None:
        """An editor left something beside it."""
        file = write(tmp_path / "spoiled", spoil.format(secrets.token_urlsafe(36)))
        tree = put(good(tmp_path), setting, [file] if setting.endswith("s") else file)
        if setting.startswith("issuer.upstream"):
            tree = put(tree, "issuer.kind", "upstream")
        told = refusal(tree)
        assert told.startswith(f"{setting}: {file}: ")
        assert "line" in told.partition("; ")[2], "the remedy"

    def test_that_are_no_proxy_are_named(self, tmp_path: Path) -> None:
        """The same; what is in it is not shown."""
        file = write(tmp_path / "proxy", "socks5://u:password@h:1\n")
        upstream = {"proxy_file": file, "api_secret": secrets.token_urlsafe(24)}
        tree = merged(good(tmp_path), {"issuer.kind": "upstream", "issuer.upstream": upstream})
        assert refusal(tree) == (
            f'issuer.upstream.proxy_file: {file}: expected "http://HOST:PORT", "https://HOST:PORT"'
            ' or "direct"'
        )

    @pytest.mark.parametrize("variable", config.VENDOR_VARIABLES)
    def test_a_key_from_the_environment_goes_by_its_variable(
        self, tmp_path: Path, variable: str
    ) -> None:
        """No setting was used, so none is named."""
        tree = put(good(tmp_path), "issuer.kind", "upstream")
        with pytest.raises(ConfigError, match=f"^{variable}: not a key: "):
            factory.check(settings(tree), {variable: f" {secrets.token_urlsafe(24)}"})

    def test_of_two_keys_in_the_environment_the_one_by_the_usual_name_counts(
        self, tmp_path: Path
    ) -> None:
        """The old name may still hold a key that is not good any more: it is never shown."""
        relay = settings(put(good(tmp_path), "issuer.kind", "upstream"))
        given = {name: secrets.token_urlsafe(24) for name in config.VENDOR_VARIABLES}
        assert credentials.vendor_keys(relay, given) == [Secret(given["BITHUMAN_API_SECRET"])]


class TestLimits:
    def test_have_the_defaults_as_buckets(self) -> None:
        """Burst and interval of each kind; the client's is off."""
        limits = factory.limits(Settings())
        found = {
            s.name: (s.rule.limit.burst, s.rule.limit.interval, s.rule.dry_run, dict(s.overrides))
            for s in (limits.fingerprint, limits.fingerprint_mints, limits.agent)
        }
        assert found == {
            LimitName.FINGERPRINT: (20, 1_000_000, False, {}),
            LimitName.FINGERPRINT_MINTS: (6, 10_000_000, False, {}),
            LimitName.AGENT: (1000, 10_000, False, {}),
        }
        assert (limits.client, limits.max_tracked) == (None, 1_000_000)

    @pytest.mark.parametrize("kind", ["fingerprint", "fingerprint_mints", "agent"])
    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ({}, (7, 2_000_000, True)),
            ({"rate": 60}, (7, 1_000_000, True)),
            ({"burst": 9}, (9, 2_000_000, True)),
            ({"per": "30s"}, (7, 1_000_000, True)),
            ({"dry_run": False}, (7, 2_000_000, False)),
        ],
    )
    def test_of_an_agent_inherit_what_is_left_out(
        self, kind: str, override: Tree, expected: tuple[int, int, bool]
    ) -> None:
        """An override changes what it says and nothing else; other agents are not touched."""
        section = {"rate": 30, "burst": 7, "dry_run": True, "overrides": {"A1": override}}
        limit_set = getattr(factory.limits(settings({"limits": {kind: section}})), kind)
        rule, other = limit_set.for_agent("A1"), limit_set.for_agent("B2")
        assert (rule.limit.burst, rule.limit.interval, rule.dry_run) == expected
        assert (other.limit.burst, other.limit.interval, other.dry_run) == (7, 2_000_000, True)

    def test_of_a_client_are_there_when_configured(self) -> None:
        """All requests of one client, without exceptions by agent."""
        tree: Tree = {"limits": {"client": {"rate": 2, "burst": 3, "per": "1s", "dry_run": True}}}
        client = factory.limits(settings(tree)).client
        assert client is not None
        assert (client.name, client.rule.limit.burst) == (LimitName.CLIENT, 3)
        assert (client.rule.limit.interval, client.rule.dry_run) == (500_000, True)


class TestBudget:
    def test_of_a_local_issuer_is_none(self) -> None:
        """A signature costs nobody anything."""
        assert factory.budget(Settings()) is None

    def test_that_is_configured_holds_for_any_issuer(self) -> None:
        """In seconds, as the pacer counts."""
        budget = factory.budget(settings({"issuer": {"budget": {"rate": 5, "per": "1m"}}}))
        assert budget is not None
        assert (budget.rate, budget.per, budget.burst, budget.max_wait) == (5, 60, 8, 8)

    def test_of_an_upstream_issuer_is_there_without_being_asked_for(self) -> None:
        """G4: no configuration relays without a budget."""
        budget = factory.budget(settings({"issuer": {"kind": "upstream"}}))
        assert budget is not None
        assert (budget.rate, budget.per, budget.burst, budget.max_wait) == (106, 60, 8, 8)


class TestMissingFiles:
    def test_are_those_that_are_not_there(self, tmp_path: Path) -> None:
        """By setting and path; a file that is there is not named, whatever is in it."""
        tree = merged(
            good(tmp_path),
            {
                "clients.shop.secret_file": "/nowhere/shop",
                "issuer.local.keys.two.secret_file": f"{tmp_path}/web/two",
                "store.encryption_key_file": "/nowhere/key",
            },
        )
        assert missing_secrets.missing_files(settings(tree)) == [
            ("clients.shop.secret_file", "/nowhere/shop"),
            ("issuer.local.keys.two.secret_file", f"{tmp_path}/web/two"),
            ("store.encryption_key_file", "/nowhere/key"),
        ]

    @pytest.mark.parametrize(
        ("kind", "missing"),
        [("local", "issuer.local.keys_file"), ("upstream", "issuer.upstream.proxy_file")],
    )
    def test_are_those_of_the_issuer_that_is_in_use(self, kind: str, missing: str) -> None:
        """Nobody reads the other one's."""
        local, upstream = {"keys_file": "/nowhere/keys"}, {"proxy_file": "/nowhere/proxy"}
        tree: Tree = {"issuer": {"kind": kind, "local": local, "upstream": upstream}}
        assert [name for name, _ in missing_secrets.missing_files(settings(tree))] == [missing]

    def test_are_not_those_that_may_not_be_seen(self, tmp_path: Path) -> None:
        """A closed folder hides whether the file is there: reading it says what is wrong."""
        folder = tmp_path / "closed"
        folder.mkdir()
        folder.chmod(0)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            missing = missing_secrets.is_missing(str(folder / "secret"))
        finally:
            os.seteuid(before)
            folder.chmod(0o700)
        assert not missing
        assert not missing_secrets.is_missing("a\0b")

    @pytest.mark.parametrize("is_here", [False, True])
    def test_of_keys_are_made_up_only_where_there_is_none(
        self, tmp_path: Path, *, is_here: bool
    ) -> None:
        """A file of keys that is here is the one that signs."""
        file = write(tmp_path / "keys.json", "{}") if is_here else "/nowhere/keys.json"
        tree: Tree = {"issuer": {"local": {"keys_file": file}}}
        local = missing_secrets.fill_missing_secrets(
            settings(tree), lambda _: Secret(secrets.token_urlsafe(48))
        ).issuer.local
        assert (local.keys_file == file, len(local.keys)) == (is_here, not is_here)

    def test_are_made_up_so_that_everything_else_is_checked(self, tmp_path: Path) -> None:
        """A secret in place of each missing file, by its setting; what is there stays."""
        tree = merged(
            good(tmp_path),
            {
                "clients.shop": {"secret_file": "/nowhere/shop", "agents": ["A1"]},
                "issuer.local.keys.two.secret_file": "/nowhere/two",
                "issuer.local.signing_key": "two",
                "issuer.upstream.api_secret_files": ["/nowhere/vendor"],
                "store.encryption_key_file": "/nowhere/key",
            },
        )
        asked: list[str] = []

        def make(name: str) -> Secret:
            asked.append(name)
            return Secret(name + secrets.token_urlsafe(32))

        before = settings(tree)
        made = missing_secrets.fill_missing_secrets(before, make)
        assert sorted(asked) == [
            "clients.shop.secret",
            "issuer.local.keys.two.secret",
            "issuer.upstream.api_secret",
            "store.encryption_key",
        ]
        assert missing_secrets.missing_files(made) == []
        assert made.clients["web"] == before.clients["web"]
        assert made.clients["shop"].agents == ("A1",)
        assert before == settings(tree)
        factory.check(made, NOTHING)


class TestCertificates:
    """Of a store with TLS: read at the check, so that no start fails half-way."""

    def test_that_cannot_be_used_are_one_line(self, tmp_path: Path) -> None:
        """Missing, no certificates at all, a key that is another's, or that has a passphrase."""
        write_certificates(tmp_path)
        (tmp_path / "other").mkdir()
        write_certificates(tmp_path / "other")
        ca, cert, key = (str(tmp_path / name) for name in ("ca.crt", "server.crt", "server.key"))
        empty = write(tmp_path / "empty", "")
        locked = tmp_path / "locked"
        locked.write_bytes(
            serialization.load_pem_private_key(Path(key).read_bytes(), None).private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(secrets.token_bytes(16)),
            )
        )
        other = str(tmp_path / "other" / "server.key")
        gone = "cannot read /nowhere: No such file or directory"
        for files, told in (
            ({"tls_ca_file": "/nowhere"}, f"tls_ca_file: {gone}"),
            (
                {"tls_ca_file": str(tmp_path)},
                f"tls_ca_file: cannot read {tmp_path}: a directory; name a file in it",
            ),
            ({"tls_ca_file": empty}, f"tls_ca_file: {empty} cannot be used: "),
            ({"tls_ca_file": "a\0b"}, "tls_ca_file: cannot read a\0b: not a path"),
            ({"tls_cert_file": "/nowhere"}, f"tls_cert_file: {gone}"),
            ({"tls_cert_file": cert}, f"tls_cert_file: {cert} cannot be used: "),
            (
                {"tls_cert_file": cert, "tls_key_file": other},
                f"tls_cert_file: {cert} cannot be used",
            ),
            (
                {"tls_cert_file": cert, "tls_key_file": str(locked)},
                f"tls_cert_file: {cert} cannot be used",
            ),
        ):
            store = {"url": "valkeys://h", "encryption_key": "k" * 31 + "ey-of-a-test", **files}
            with pytest.raises(ConfigError) as caught:
                factory.check(settings(merged(good(tmp_path), {"store": store})), NOTHING)
            assert str(caught.value).startswith(f"store.{told}"), files
        assert ca  # what is right is used by the tests of the ACL line

    def test_without_tls_are_refused(self) -> None:
        """Somebody believes that the connection is encrypted, and it is not."""
        key = {"encryption_key": "k" * 40}
        for store, told in (
            ({"url": "valkey://h", "tls_ca_file": "/a"}, "store.tls_ca_file: store.url has no TLS"),
            (
                {"url": "unix:///s", "tls_cert_file": "/a"},
                "store.tls_cert_file: store.url has no TLS",
            ),
            (
                {"url": "valkeys://h", "tls_key_file": "/a"},
                "store.tls_key_file: needs store.tls_ce",
            ),
        ):
            with pytest.raises(ConfigError, match=told):
                settings({"store": store | key})

    def test_that_are_elsewhere_are_missing_and_not_made_up(self, tmp_path: Path) -> None:
        """A check in a pipeline has none of them; the start needs them."""
        files = {
            "tls_ca_file": "/nowhere/ca",
            "tls_cert_file": "/nowhere/cert",
            "tls_key_file": "/nowhere/key",
        }
        store = {"url": "valkeys://h", "encryption_key_file": "/nowhere/sealing", **files}
        tree = settings(merged(good(tmp_path), {"store": store}))
        assert {name for name, _ in missing_secrets.missing_files(tree)} == {
            "store.encryption_key_file",
            *(f"store.{name}" for name in files),
        }
        made = missing_secrets.fill_missing_secrets(
            tree, lambda _name: Secret(secrets.token_urlsafe(48))
        )
        assert missing_secrets.missing_files(made) == []
        factory.check(made, NOTHING)
        assert factory.store_access(made).tls is not None


@pytest.mark.parametrize(
    ("url", "shows"),
    [
        ("valkey://store.example", True),
        ("valkey://10.0.0.9", True),
        ("valkey+cluster://127.0.0.1,10.0.0.9", True),
        ("valkey://127.0.0.1", False),
        ("redis://localhost:1", False),
        ("valkey://[::1]", False),
        ("valkeys://store.example", False),
        ("unix:///run/s", False),
        ("memory://", False),
    ],
)
def test_a_password_in_clear_text_is_noticed(url: str, shows: bool) -> None:
    """Where others could read it: not within this machine, not with TLS, not without one."""
    store = {"url": url, "encryption_key": "k" * 40}
    assert not factory.shows_password(settings({"store": store}))
    for secret in ({"password": "p"}, {"password_file": "/p"}):
        assert factory.shows_password(settings({"store": store | secret})) is shows


def test_the_stores_secrets_travel_in_place_of_their_files(tmp_path: Path) -> None:
    """So that a worker that starts later has what its siblings have."""
    password = secret_file(tmp_path / "password")
    sealing = secret_file(tmp_path / "sealing")
    store = {"url": "valkey://h", "password_file": password, "encryption_key_file": sealing}
    tree = settings(merged(good(tmp_path), {"store": store}))
    key = credentials.sealing_key(tree)
    told = factory.with_store_secrets(tree, key)
    for file in (password, sealing):
        Path(file).unlink()
    assert credentials.sealing_key(told) == key
    assert factory.store_access(told).password is not None
    assert told.store.password_file is told.store.encryption_key_file is None
    assert replace(told, store=tree.store) == tree


@pytest.mark.parametrize(
    "dotted", [dotted for dotted, _ in keys() if dotted.endswith(("_file", "_files"))]
)
def test_N12_every_file_of_the_settings_is_watched(dotted: str) -> None:
    """One that is not is read again by chance only."""
    value = ["/there/it/is"] if dotted.endswith("_files") else "/there/it/is"
    watched = [file for _, file in factory.watched_files(alone(dotted, value))]
    assert "/there/it/is" in watched


@pytest.mark.parametrize("dotted", [dotted for dotted, kind in keys() if "Secret" in str(kind)])
def test_every_secret_of_the_settings_is_in_the_one_list(dotted: str) -> None:
    """One that is not would be in a second role without a word."""
    given = secrets.token_urlsafe(32)
    found = [setting.inline for setting in secret_settings(alone(dotted, given))]
    assert Secret(given) in found


@pytest.mark.parametrize("kind", ["local", "upstream"])
def test_D7_a_state_file_is_sealed_for_the_keys_that_the_issuer_has(
    tmp_path: Path, kind: str
) -> None:
    """Those that were read for it: the files may have others by now, or be gone."""
    key = tmp_path / "the key"
    tree = merged(
        good(tmp_path),
        {
            "issuer.kind": kind,
            "issuer.local.keys": key_tree(secret_file(key)),
            "issuer.upstream.api_secret_files": [str(key)],
        },
    )
    known = settings(tree)
    keys = credentials.issuer_keys(known, NOTHING)
    revealed = secret_in(str(key))
    key.unlink()
    (own,), also = credentials.state_file_keys(known, keys)
    assert own.reveal() == (revealed if kind == "upstream" else revealed.encode().hex())
    assert also == ()


def test_D7_a_key_of_its_own_is_the_only_one_that_a_state_file_is_sealed_for(
    tmp_path: Path,
) -> None:
    """The issuer's open what they sealed before, and nothing that is written from then on."""
    sealing = secrets.token_urlsafe(48)
    known = settings(merged(good(tmp_path), {"store.encryption_key": sealing}))
    keys = credentials.issuer_keys(known, NOTHING)
    now, also = credentials.state_file_keys(known, keys)
    assert [key.reveal() for key in now] == [sealing]
    assert len(also) == 1


@pytest.mark.parametrize(("budget", "seconds"), [(None, 21.0), ({"max_wait": "7s"}, 28.0)])
async def test_a_mint_has_the_time_of_its_turn_and_of_its_call(
    budget: dict[str, str] | None, seconds: float
) -> None:
    """And what a back-off or a retry takes: the call itself tells first that time ran out."""
    tree: Tree = {"issuer": {"upstream": {"timeout": "15s"}}}
    async with serving(tree if budget is None else put(tree, "issuer.budget", budget)) as edge:
        assert edge.app.parts.minter._timeout == seconds
