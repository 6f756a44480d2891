"""Units of time, and where a number stops being a time."""

SECOND = 1_000_000
"""Microseconds in a second."""

NO_DATE = 10**12
"""Seconds since 1970 (year 33658) from which a number is taken for nonsense, not for a date."""
