# SPDX-License-Identifier: Apache-2.0
"""A thread that calls a function at a steady rate."""

from collections.abc import Callable
import threading
import time


class Watchdog:
    """
    Calls ``tick`` every ``period_s`` seconds on a thread of its own until stopped.

    Not a ROS timer: those wait for the executor, which is busy during a long configure, and for
    the simulated clock, which may stand still.
    """

    def __init__(self, period_s: float, tick: Callable[[], None],
                 log_error: Callable[[str], None]) -> None:
        """Start; an exception in ``tick`` is logged and the next tick comes as usual."""
        self._period_s = period_s
        self._tick = tick
        self._log_error = log_error
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name='anomaly_seg watchdog', daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; after this no tick runs."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        due = time.monotonic() + self._period_s
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            try:
                self._tick()
            except Exception as error:  # the watchdog outlives whatever it watches
                self._log_error(f'watchdog: {type(error).__name__}: {error}')
            due = max(due + self._period_s, time.monotonic())
