"""State on disk: a file behind the store in memory, written as things happen."""
