"""The fake vendor: a real HTTP server that fails on demand."""
