# SPDX-License-Identifier: Apache-2.0
"""
Where frames wait for the worker: one slot that the newest frame takes, or a bounded queue.

With one slot, frames better wait in the middleware: taking one costs milliseconds under Python's
lock, in vain if a newer one replaces it. ``Gate`` leaves them there until the worker waits.
"""

from collections import deque
from collections.abc import Callable
import threading
import time
from typing import Any, Generic, TypeVar

from rclpy.callback_groups import CallbackGroup

T = TypeVar('T')


class Mailbox(Generic[T]):
    """
    A bounded first-in first-out queue whose ``put`` never waits: it pushes the oldest out.

    With ``size`` 1 the newest item wins. Safe for use by several threads.
    """

    def __init__(self, size: int = 1, on_waiting: Callable[[], None] | None = None) -> None:
        """
        Hold at most ``size`` items.

        ``on_waiting`` is called when somebody begins to wait; it must not use this mailbox.
        """
        if size < 1:
            raise ValueError(f'size must be at least 1, got {size}')
        self._size = size
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._waiting = False
        self._on_waiting = on_waiting

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for an item."""
        return self._waiting

    def put(self, item: T) -> T | None:
        """Add an item; return the oldest one if it had to go. A closed mailbox takes nothing."""
        with self._changed:
            if self._closed:
                return item
            self._items.append(item)
            self._waiting = False
            pushed_out = self._items.popleft() if len(self._items) > self._size else None
            self._changed.notify()
        # Hand Python's lock to whom was woken; he would get it a quarter of a millisecond later.
        time.sleep(0)
        return pushed_out

    def get(self) -> T | None:
        """Wait for an item and take it; None once the mailbox is closed."""
        with self._changed:
            while not self._items and not self._closed:
                # Again after each wake-up: what was put may have been cleared away since.
                if not self._waiting:
                    self._waiting = True
                    if self._on_waiting is not None:
                        self._on_waiting()
                self._changed.wait()
            self._waiting = False
            return None if self._closed else self._items.popleft()

    def clear(self) -> int:
        """Throw all items away and return how many there were."""
        with self._changed:
            count = len(self._items)
            self._items.clear()
            return count

    def close(self) -> None:
        """Throw all items away and let every ``get`` return None."""
        with self._changed:
            self._closed = True
            self._waiting = False
            self._items.clear()
            self._changed.notify_all()


class Gate(CallbackGroup):  # type: ignore[misc]
    """
    A callback group whose subscription is taken from only while ``is_open`` says so.

    The executor looks when it builds its wait set: wake it when the answer becomes yes.
    """

    def __init__(self, is_open: Callable[[], bool]) -> None:
        """Ask ``is_open`` each time."""
        super().__init__()
        self._is_open = is_open

    def can_execute(self, entity: Any) -> bool:
        """Tell whether the entity may be waited for and taken from now."""
        return self._is_open()

    def beginning_execution(self, entity: Any) -> bool:
        """Allow what has been taken to run."""
        return True

    def ending_execution(self, entity: Any) -> None:
        """Do nothing: one thread runs all callbacks."""
