"""The protocol: connections, topology, scripts, messages."""
