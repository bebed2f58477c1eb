"""How a run says that it was asked to stop; imports nothing, so that the command line can know it for free."""


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal ended the run early, after it had saved itself; the same command continues it."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"Stopped at step {step}; everything is saved. The same command continues.")
        self.signal_number = signal_number
