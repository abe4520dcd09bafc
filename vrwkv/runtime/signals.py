"""The signals that ask a run to end: from a terminal, a job manager, torchrun."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from vrwkv.runtime.errors import Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE = 30.0  # seconds, torchrun's before it kills


class StopSignals:
    """While it is entered, Ctrl-C, SIGTERM and SIGUSR1 raise `Interrupted`, or within `deferred` are only noted.

    A second Ctrl-C raises KeyboardInterrupt anywhere; the other signals are sent twice by torchrun under SLURM, and
    count once. Outside of the main thread, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None  # the name of the first
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received, self.received or signal.Signals(number).name
        if again:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
        elif not self._deferred:
            raise Interrupted(self.received)

    @contextmanager
    def deferred(self, defer: bool = True) -> Iterator[None]:
        """Only notes signals; with `defer=False`, inside of such a block, raises for them again, old ones included."""
        before, self._deferred = self._deferred, defer
        try:
            if self.received and not defer:
                raise Interrupted(self.received)
            yield
        finally:
            self._deferred = before


def outlive_stop_signals() -> None:
    """For loader workers, whose batches may be needed to finish a step: who started them ends them.

    A worker that got SIGTERM ends by itself after `GRACE` seconds, because that is also how Python ends, and then waits
    for, children that are left when it exits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))  # a code that the main process does not report as a failure
    signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, GRACE))
