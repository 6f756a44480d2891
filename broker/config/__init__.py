"""From file, environment and flags to checked settings."""
