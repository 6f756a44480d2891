"""The version, said once: the package's metadata takes it from here.

Not read back from that metadata, which takes longer than most commands.
"""

VERSION = "0.1.0"
