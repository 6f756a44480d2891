"""The version, as installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("embed-token-broker")
except PackageNotFoundError:  # a source tree that was never installed
    VERSION = "0+unknown"
