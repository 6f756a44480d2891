"""Decisions as arithmetic: no I/O, no clock, no aiohttp.  Time comes in, a value goes out."""
