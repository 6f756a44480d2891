"""Limits on requests: which buckets there are, and how full each is."""
