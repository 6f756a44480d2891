"""One broker put together: construction, life cycle, reload."""
