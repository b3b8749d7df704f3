# SPDX-License-Identifier: Apache-2.0
"""Where frames wait for the worker: one slot that the newest frame takes, or a bounded queue."""

from collections import deque
import threading
from typing import Generic, TypeVar

T = TypeVar('T')


class Mailbox(Generic[T]):
    """
    A bounded first-in first-out queue whose ``put`` never waits: it pushes the oldest out.

    With ``size`` 1 the newest item wins. Safe for use by several threads.
    """

    def __init__(self, size: int = 1) -> None:
        """Hold at most ``size`` items."""
        if size < 1:
            raise ValueError(f'size must be at least 1, got {size}')
        self._size = size
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: T) -> T | None:
        """Add an item; return the oldest one if it had to go. A closed mailbox takes nothing."""
        with self._changed:
            if self._closed:
                return item
            self._items.append(item)
            pushed_out = self._items.popleft() if len(self._items) > self._size else None
            self._changed.notify()
            return pushed_out

    def get(self) -> T | None:
        """Wait for an item and take it; None once the mailbox is closed."""
        with self._changed:
            while not self._items and not self._closed:
                self._changed.wait()
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
            self._items.clear()
            self._changed.notify_all()
