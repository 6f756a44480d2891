"""From `[store] url` to where the store is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config.addresses import DEFAULT_PORT, MAX_DB, StoreAddress, parse_store_url

HERE = (("localhost", DEFAULT_PORT),)


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("valkey://localhost", StoreAddress(HERE), "localhost:6379"),
        ("redis://localhost/", StoreAddress(HERE), "localhost:6379"),
        ("valkey://10.0.0.1:7000/3", StoreAddress((("10.0.0.1", 7000),), db=3), "10.0.0.1:7000"),
        ("valkeys://localhost", StoreAddress(HERE, tls=True), "localhost:6379"),
        ("rediss://[::1]:7/1", StoreAddress((("::1", 7),), db=1, tls=True), "[::1]:7"),
        ("valkey://[::1]", StoreAddress((("::1", DEFAULT_PORT),)), "[::1]:6379"),
        ("unix:///run/valkey.sock", StoreAddress(path="/run/valkey.sock"), "unix:/run/valkey.sock"),
        ("unix:///s?db=2", StoreAddress(path="/s", db=2), "unix:/s"),
        (
            "valkey+cluster://a:1,b,[::1]:3",
            StoreAddress((("a", 1), ("b", DEFAULT_PORT), ("::1", 3)), cluster=True),
            "a:1,b:6379,[::1]:3",
        ),
        ("rediss+cluster://a", StoreAddress((("a", 6379),), tls=True, cluster=True), "a:6379"),
    ],
)
def test_an_address_is_read_and_shown(text: str, address: StoreAddress, shown: str) -> None:
    """Whole: hosts, database, TLS, cluster; and how logs name it."""
    assert parse_store_url(text) == address
    assert address.shown == shown


@pytest.mark.parametrize("number", [0, 1, MAX_DB])
def test_a_database_is_any_number_that_a_server_can_have(number: int) -> None:
    """Of a socket's, too."""
    for text in (f"valkey://host/{number}", f"unix:///run/s?db={number}"):
        address = parse_store_url(text)
        assert isinstance(address, StoreAddress)
        assert address.db == number


def test_memory_is_no_address() -> None:
    """The default needs no server."""
    assert parse_store_url("memory://") is None


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("redis://user:secret@host", "store.password_file"),
        ("redis://user@host", "store.username"),
        ("valkey+cluster://a/1", "leave the number out"),
        ("valkey://a,b", "valkey+cluster://"),
        ("valkey://::1", "brackets"),
        ("valkey://host/x", "number"),
        (f"valkey://host/{MAX_DB + 1}", "number"),
        ("valkey://host/-1", "number"),
        ("unix://run/valkey.sock", "absolute path"),
        ("unix:///", "absolute path"),
        ("unix:///s?database=1", "absolute path"),
        ("unix:///s?db=x", "number"),
        ("valkey://[::1", "brackets"),
        *[
            (text, "expected memory://, sqlite:///PATH for a file, valkey://HOST[:PORT][/DB]")
            for text in (
                *("", "memory", "memory:///x", "localhost:6379", "http://host", "valkey://"),
                *("valkey://host:0", "valkey://host:65536", "valkey://host:x", "valkey://:1"),
                *("valkey://host#x", "valkey://host?db=1", "valkey://ho\nst"),
                *("valkey+cluster://", "valkey+cluster://a,", "valkey:///run/s", "VALKEY:/x"),
            )
        ],
    ],
)
def test_what_is_no_address_is_refused_with_the_remedy(text: str, remedy: str) -> None:
    """The message says what is expected, and shows no password."""
    with pytest.raises(ValueError, match=r".") as caught:
        parse_store_url(text)
    assert remedy in str(caught.value)
    assert "secret" not in str(caught.value)


@given(text=st.text() | st.text(alphabet="valkey+cluster:/[]@,?#0123. ").map("valkey://".__add__))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    """Nothing else is raised, whatever stands there."""
    try:
        address = parse_store_url(text)
    except ValueError:
        return
    if address is not None:
        assert all(host and 0 < port < 65_536 for host, port in address.hosts)
        assert address.shown
