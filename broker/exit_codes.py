"""Exit codes, after sysexits.h where it has one.

A second signal while draining ends the process at once with 128 + its number.
"""

EX_OK = 0
"""Done."""

EX_NO = 1
"""The answer is no."""

EX_USAGE = 64
"""Wrong usage of a command."""

EX_UNAVAILABLE = 69
"""An address or a service is unavailable."""

EX_IOERR = 74
"""The result of a command could not be written."""

EX_CONFIG = 78
"""The configuration cannot be used."""

FATAL_EXIT_CODES = frozenset({EX_UNAVAILABLE, EX_CONFIG})
"""Those with which a worker says at the start that another try would end alike."""
