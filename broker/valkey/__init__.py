"""State that replicas share, on a server of the Redis protocol."""
