"""End a run early: Ctrl-C and SIGTERM end it after the current step, and a watchdog ends it when a step hangs."""

import faulthandler
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial


class StopSignal:
    """While entered, notes SIGINT (Ctrl-C) and SIGTERM in `number` (0: none yet); a second signal ends the process."""

    def __enter__(self):
        self.number = 0
        self.handlers = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame):
        self.number = number
        self.restore_handlers()

    def restore_handlers(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def __exit__(self, kind, error, trace):
        self.restore_handlers()
        # A terminal sends Ctrl-C to the C++ compiler of --compile too, which fails, and torch reports that instead.
        if self.number and isinstance(error, RuntimeError):
            raise KeyboardInterrupt from None


def ignore_signals(worker: int):
    """For DataLoader workers: a terminal's Ctrl-C reaches them too, but they must serve the step that is running."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def watchdog(seconds: float) -> Iterator[Callable]:
    """Yield a function to call at each step; `seconds` after its last call the process prints its stack and ends."""
    try:
        yield partial(faulthandler.dump_traceback_later, seconds, exit=True, file=sys.__stderr__)
    finally:
        faulthandler.cancel_dump_traceback_later()
