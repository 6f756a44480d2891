"""Whether this instance should get traffic."""


class Health:
    """`draining` is set once, when the process has been asked to stop."""

    def __init__(self) -> None:
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether a balancer should send requests here."""
        return not self.draining
