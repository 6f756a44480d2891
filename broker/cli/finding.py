"""One thing that `broker check` or `broker doctor` found, and how findings are printed."""

from collections.abc import Iterable
from enum import Enum

import msgspec
from msgspec import Struct
from typing_extensions import override

from broker.config.schema import ConfigError
from broker.telemetry.streams import one_line


class Level(Enum):
    """How much a finding matters."""

    OK = "ok"
    """Examined, and well."""
    NOTE = "note"
    """Works, but perhaps not as it was meant."""
    PROBLEM = "problem"
    """Does not work until it is mended."""


class Finding(Struct, frozen=True):
    """One examined thing, by the key it is about; `text` has the rule and the remedy."""

    level: Level
    key: str
    text: str

    @classmethod
    def of(cls, error: ConfigError, level: Level = Level.PROBLEM) -> "Finding":
        """Return what is wrong with a configuration as a finding."""
        return cls(level, error.key, str(error).removeprefix(f"{error.key}: "))

    @property
    def ok(self) -> bool:
        """Whether nothing has to be done about it."""
        return self.level is not Level.PROBLEM

    @property
    def line(self) -> str:
        """Key, rule and remedy in one line."""
        told = self.key and not self.text.startswith("unknown key ")  # has its key already
        return one_line(f"{self.key}: {self.text}" if told else self.text)

    @override
    def __str__(self) -> str:
        return f"{self.level.value:<9}{self.line}"


def as_json(findings: Iterable[Finding]) -> str:
    """Return one JSON document: `{"ok": bool, "findings": [{"level", "key", "text"}, ...]}`."""
    found = list(findings)
    document = {"ok": all(finding.ok for finding in found), "findings": found}
    return msgspec.json.format(msgspec.json.encode(document)).decode()
