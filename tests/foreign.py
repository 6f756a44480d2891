"""What may stand in a store where a number of ours should: by others, or by another version."""

FOREIGN = [
    *("nan", "-nan", "inf", "-inf", "-1", "1e300", "1e400", "1e18", "-1e18"),
    *("1" + "0" * 18, "-1" + "0" * 18, "1" + "0" * 400),
    *("", "abc", " 12 ", "12\n", "0x10", "1.5", "1,5", "\xff", "x" * 100_000),
]
"""None of them is a whole number, in decimal digits, that a double holds exactly.  Lua's `tonumber`
takes most of them."""
