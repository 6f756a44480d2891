"""The settings tree: values, their defaults, and that nothing in it is said by accident."""

import ast
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import fields, replace

from broker.config import load as config
from broker.config import settings
from broker.config.settings import Duration, Settings
from broker.model import Secret

YEAR = 366 * 24 * 3_600_000_000


def sections() -> Iterator[tuple[str, ast.ClassDef]]:
    """Every table of the tree, as it is written."""
    tree = ast.parse(Path(settings.__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and issubclass(getattr(settings, node.name), Struct):
            yield node.name, node


class TestTree:
    def test_gives_a_reason_for_every_default(self) -> None:
        """Under each setting stands a docstring: what it is for, and why it is set as it is."""
        silent = [
            f"{name}.{statement.target.id}"
            for name, section in sections()
            for statement, following in zip(section.body, [*section.body[1:], None], strict=True)
            if isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant))
        ]
        assert silent == []

    def test_is_good_as_it_ships(self) -> None:
        """The defaults pass every check that a file has to pass."""
        assert config.from_tree({}) == Settings()

    def test_cannot_be_changed(self) -> None:
        """Whoever holds settings holds values: no section has a field that can be set."""
        names = [name for name, _ in sections()]
        assert len(names) > 10
        assert [n for n in names if not getattr(settings, n).__struct_config__.frozen] == []

    def test_refuses_unknown_fields_in_every_section(self) -> None:
        """A misspelt limit would otherwise be no limit."""
        kinds = [getattr(settings, name) for name, _ in sections()]
        assert [k for k in kinds if not k.__struct_config__.forbid_unknown_fields] == []

    def test_grants_nothing_by_default(self) -> None:
        """Unset never means allowed: no client, no agent, no key, no trusted proxy, no pages."""
        tree = Settings()
        client = settings.ClientSettings()
        assert (tree.clients, tree.issuer.local.keys) == ({}, {})
        assert (client.agents, client.allow_origin_header) == ((), False)
        assert (tree.server.trusted_proxies, tree.server.docs) == ((), False)

    def test_listens_on_loopback_by_default(self) -> None:
        """Whoever wants others to reach it has to say so."""
        assert Settings().server.listen.startswith("127.0.0.1:")
        assert Settings().admin.listen.startswith("127.0.0.1:")

    def test_G7_masks_its_secrets(self) -> None:
        """The representation of a tree full of secrets shows none of them."""
        canary = secrets.token_urlsafe(32)
        secret = Secret(canary)
        tree = replace(
            Settings(),
            clients={"web": settings.ClientSettings(secret=secret)},
            issuer=settings.IssuerSettings(
                local=settings.LocalIssuerSettings(
                    keys={"one": settings.KeySettings(secret=secret)}
                )
            ),
            store=settings.StoreSettings(encryption_key=secret),
        )
        assert canary not in f"{tree!r} {tree}"

    def test_G7_types_every_secret_as_one(self) -> None:
        """A setting that is named like a secret has the type that masks itself."""
        plain = [
            f"{name}.{field.name}"
            for name, _ in sections()
            for field in fields(getattr(settings, name))
            if field.name in ("secret", "encryption_key", "api_secret")
            and set(get_args(field.type)) != {Secret, NoneType}
        ]
        assert plain == []


class TestDuration:
    @given(st.integers(0, YEAR))
    def test_reads_back_what_it_writes(self, us: int) -> None:
        """What `config show` prints is what a file may say, to the microsecond."""
        written = str(Duration(us))
        tree = config.from_tree({"server": {"drain_lead": "0s", "drain": written}})
        assert tree.server.drain == Duration(us)

    @pytest.mark.parametrize(
        ("text", "us"),
        [
            ("0s", 0),
            ("1us", 1),
            ("500ms", 500_000),
            ("0.5s", 500_000),
            ("4.35s", 4_350_000),
            ("12s", 12_000_000),
            ("1.5m", 90_000_000),
            ("2h", 7_200_000_000),
            ("8784h", YEAR),
        ],
    )
    def test_is_written_with_a_unit(self, text: str, us: int) -> None:
        """A number and one of us, ms, s, m, h; fractions are fine."""
        tree = config.from_tree({"server": {"drain": text, "drain_lead": "0s"}})
        assert tree.server.drain.us == us
        assert tree.server.drain.seconds == us / 1_000_000

    @pytest.mark.parametrize(
        ("us", "text"),
        [
            (0, "0ms"),
            (1, "1us"),
            (1_500, "1500us"),
            (2_000, "2ms"),
            (90_000_000, "90s"),
            (300_000_000, "5m"),
            (3_600_000_000, "1h"),
            (1_234_567_891, "1234567891us"),
        ],
    )
    def test_shows_itself_in_the_largest_whole_unit(self, us: int, text: str) -> None:
        """People read "5m", not 300000000."""
        assert (str(Duration(us)), repr(Duration(us))) == (text, text)

    def test_equals_another_way_to_say_the_same(self) -> None:
        """60 s are a minute; a number is not a span."""
        same: Any = config.from_tree({"server": {"drain": "60s"}}).server.drain
        other: Any = config.from_tree({"server": {"drain": "1m"}}).server.drain
        assert same == other
        assert hash(same) == hash(other)
        assert same != 60_000_000
