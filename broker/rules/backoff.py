"""How long to wait after a failure: exponential growth, full jitter.

Full jitter (uniform between nothing and the cap) spreads retries of many callers best; see
the AWS Architecture Blog, "Exponential Backoff And Jitter".
"""

from collections.abc import Callable


def full_jitter(failures: int, base: int, cap: int, draw: Callable[[], float]) -> int:
    """Microseconds to wait after the given number of consecutive failures (1 or more).

    `draw` returns a number in [0, 1).  The exponent is bounded before it is used, so a key that
    has failed for a year costs no big integers.
    """
    ceiling = min(cap, base * 2 ** min(failures - 1, 32))
    return int(draw() * ceiling)
