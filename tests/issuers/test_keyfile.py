"""The file of signing keys: what follows from it, how it is edited, what is refused."""

import fcntl
import json
import multiprocessing
import os
import secrets
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.issuers import keyfile
from broker.issuers.keyfile import (
    AFTERLIFE,
    MOST_KEYS,
    BadKeyFile,
    Entry,
    edit,
    read,
    rotated,
    schedule,
)
from broker.issuers.keyring import NEVER, BadKey, BadToken, Keyring
from broker.issuers.local import LocalIssuer
from broker.model import TokenRequest
from broker.testing import FakeClock
from broker.units import SECOND

NOW = 1_800_000_000
HOUR = 3600


def new_secret() -> str:
    """Make a key."""
    return secrets.token_urlsafe(32)


def first(now: int = NOW) -> list[Entry]:
    """Return the keys of a broker's first day."""
    return rotated([], now, 10, new_secret())


class TestSchedule:
    def test_a_key_verifies_until_the_last_token_of_its_time_has_expired(self) -> None:
        """Each key until its successor's start, an hour and a minute; the last one for ever."""
        entries = [Entry(kid, new_secret(), start) for kid, start in (("a", 5), ("b", 90))]
        one, two = schedule(entries)
        assert (one.signs_from, one.verifies_until) == (5 * SECOND, (90 + HOUR + 60) * SECOND)
        assert (two.signs_from, two.verifies_until) == (90 * SECOND, NEVER)

    def test_the_first_key_signs_at_once_a_later_one_when_all_know_it(self) -> None:
        """Until then the old one signs, and both verify."""
        entries = rotated(first(), NOW + 100, 10, new_secret())
        ring = Keyring(schedule(entries))
        old, new = (entry.kid for entry in entries)
        assert entries[0].signs_from == NOW
        assert [ring.signing((NOW + s) * SECOND) for s in (0, 109, 110)] == [old, old, new]

    async def test_rotation_has_no_gap_and_the_old_key_s_last_token_dies_on_time(self) -> None:
        """In virtual time, a token a second: each is good for its hour and a minute, no longer.

        Also at a broker that has read the file, and at one whose clock is 30 s off.
        """
        entries = rotated(first(), NOW + 100, 10, new_secret())
        ring = Keyring(schedule(entries))
        clock, elsewhere = FakeClock(wall=NOW * SECOND), FakeClock(wall=(NOW + 30) * SECOND)
        issuer, other = (LocalIssuer(ring, "i", "a", c) for c in (clock, elsewhere))

        async def free() -> None: ...

        made: list[tuple[int, str]] = []
        for _ in range(300):
            made.append(
                (clock.wall(), (await issuer.mint(TokenRequest("web", "A1", "beef"), free)).token)
            )
            for _, token in made[-120:]:
                assert issuer.prove(token)
                assert other.prove(token)
            clock.advance(1)
            elsewhere.advance(1)
        for minted, token in made:
            last = FakeClock(wall=minted + (HOUR - 5 + 60) * SECOND - 1)
            assert LocalIssuer(ring, "i", "a", last).prove(token)
            last.advance(0.000001)
            with pytest.raises(BadToken, match="expired"):
                LocalIssuer(ring, "i", "a", last).prove(token)
        assert {issuer.signer_id} < issuer.signer_ids
        clock.advance(AFTERLIFE)
        assert {issuer.signer_id} == issuer.signer_ids

    async def test_O2_a_key_that_has_ended_verifies_nothing_whatever_its_token_says(self) -> None:
        """Somebody found the old key and goes on signing: every token ends with the key."""
        old, new = new_secret(), new_secret()
        entries = [Entry("old", old, NOW), Entry("new", new, NOW + 100)]
        ring, thief = Keyring(schedule(entries)), Keyring.of({"old": old.encode()}, "old")
        claims = {"iss": "i", "aud": "a", "sub": "x", "nbf": NOW + 200, "exp": NOW + 3800}
        ends = (NOW + 100 + AFTERLIFE) * SECOND
        for token in (
            thief.sign(claims, 0),
            Keyring.of({"old": old.encode(), "x": new_secret().encode()}, "old").sign(claims, 0),
        ):
            assert ring.verify(token, "i", "a", ends - 1)
            with pytest.raises(BadToken, match="no key fits"):
                ring.verify(token, "i", "a", ends)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(gaps=st.lists(st.integers(0, 3 * HOUR), max_size=40), after=st.integers(0, 600))
    def test_M1_rotation_drops_what_has_ended_and_nothing_else(
        self, gaps: list[int], after: int
    ) -> None:
        """However often: a key leaves the file only when no token of it can be good."""
        now, entries = NOW, first()
        for gap in gaps:
            now += gap
            before = {key.kid: key for key in schedule(entries)}
            if sum(now * SECOND < key.verifies_until for key in before.values()) >= MOST_KEYS:
                with pytest.raises(BadKey, match="wait"):
                    rotated(entries, now, after, new_secret())
                continue
            entries = rotated(entries, now, after, new_secret())
            gone = before.keys() - {entry.kid for entry in entries}
            assert all(before[kid].verifies_until <= now * SECOND for kid in gone)
            assert len(entries) <= MOST_KEYS
            starts = [entry.signs_from for entry in entries]
            assert starts == sorted(starts)
            assert len({entry.kid for entry in entries}) == len(entries)


class TestReading:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{}",
            "[]",
            '{"keys": []}',
            '{"keys": {}}',
            '{"keys": [{"kid": "a"}]}',
            '{"keys": [{"kid": "a b", "secret": "x", "signs_from": 1}]}',
            '{"keys": [{"kid": "a", "secret": "x", "signs_from": -1}]}',
            '{"keys": [{"kid": "a", "secret": "x", "signs_from": 1e30}]}',
            '{"keys": [{"kid": "a", "secret": "x", "signs_from": 1, "typo": 2}]}',
            '{"keys": [' + "[" * 5000,
            "\udcff",
        ],
        ids=lambda text: ascii(text)[:40],
    )
    def test_what_the_command_did_not_write_is_refused(self, tmp_path: Path, text: str) -> None:
        """Empty, of another shape, with a misspelt field, cut off, not text."""
        path = tmp_path / "keys.json"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(BadKeyFile) as refusal:
            read(path)
        assert "broker keys rotate" in str(refusal.value)

    def test_G7_no_key_is_shown(self, tmp_path: Path) -> None:
        """Not by repr, nor by an error about the file it is in."""
        (entry,) = first()
        assert entry.secret not in repr(entry)
        path = tmp_path / "keys.json"
        path.write_text(json.dumps({"keys": [{"kid": entry.secret * 9, "secret": entry.secret}]}))
        with pytest.raises(BadKeyFile) as refusal:
            read(path)
        assert entry.secret not in str(refusal.value)


def turn(entries: list[Entry]) -> list[Entry]:
    """Add a key."""
    return rotated(entries, NOW, 10, new_secret())


def _turn_often(path: Path) -> None:
    for _ in range(3):
        edit(path, turn)


class TestEditing:
    def test_what_is_written_is_read_back_and_nobody_else_may_read_it(self, tmp_path: Path) -> None:
        """Mode 0600, whatever the umask; no other file stays behind."""
        path = tmp_path / "keys.json"
        before = os.umask(0)
        try:
            written = edit(path, turn)
        finally:
            os.umask(before)
        assert read(path) == written
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [found.name for found in tmp_path.iterdir()] == ["keys.json"]

    def test_a_failure_leaves_the_file_as_it_was(self, tmp_path: Path) -> None:
        """A change that cannot be made, a disk that is full, a file that is not ours."""
        path = tmp_path / "keys.json"
        edit(path, turn)
        before = path.read_bytes()

        def fail(_entries: list[Entry]) -> list[Entry]:
            raise BadKey("no")

        with pytest.raises(BadKey):
            edit(path, fail)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", _full)
            with pytest.raises(OSError, match="full"):
                edit(path, turn)
        assert path.read_bytes() == before
        assert [found.name for found in tmp_path.iterdir()] == ["keys.json"]
        path.write_text("not ours")
        with pytest.raises(BadKeyFile):
            edit(path, turn)
        assert path.read_text() == "not ours"

    def test_a_reader_never_sees_half_a_file_and_no_edit_is_lost(self, tmp_path: Path) -> None:
        """Four processes turn the keys at the same time, while somebody reads over and over."""
        path = tmp_path / "keys.json"
        edit(path, turn)
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=_turn_often, args=(path,)) for _ in range(4)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            assert read(path)
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        assert len(read(path)) == 1 + 4 * 3

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        """What it leads to is replaced: a configuration may name the link."""
        (tmp_path / "real").mkdir()
        link = tmp_path / "keys.json"
        link.symlink_to(tmp_path / "real" / "keys.json")
        with pytest.raises(BadKeyFile, match="leads nowhere"):
            edit(link, turn)  # whoever made the link would choose where a key is written
        assert list((tmp_path / "real").iterdir()) == []
        edit(tmp_path / "real" / "keys.json", turn)
        edit(link, turn)
        assert link.is_symlink()
        assert len(read(tmp_path / "real" / "keys.json")) == 2

    def test_who_holds_the_lock_cannot_stop_a_rotation_without_a_word(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever may read the folder may lock it: the command says so, and writes nothing."""
        monkeypatch.setattr(keyfile, "LOCK_WAIT", 0.1)
        handle = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_SH)
        try:
            with pytest.raises(BadKeyFile, match="is locked by another process"):
                edit(tmp_path / "keys.json", turn)
        finally:
            os.close(handle)
        assert list(tmp_path.iterdir()) == []
        edit(tmp_path / "keys.json", turn)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_the_owner_stays_the_owner(self, tmp_path: Path) -> None:
        """Turned by root, read by the broker's own user."""
        path = tmp_path / "keys.json"
        edit(path, turn)
        os.chown(path, 65534, 65534)
        edit(path, turn)
        assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)


def _full(_handle: int) -> None:
    raise OSError("full")
