"""Processes: the one that serves, or a supervisor and its workers."""
