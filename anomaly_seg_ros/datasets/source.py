# SPDX-License-Identifier: Apache-2.0
"""What every source of frames offers, be it a benchmark, a folder, a video or a bag."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
import re

from anomaly_seg_ros.datasets.frame import Frame


class FrameSource(ABC):
    """A sequence of frames that are read when they are asked for."""

    #: Name for reports.
    name: str
    #: Folder or file that was opened.
    root: Path
    #: Frames per second where the source has a rate of its own.
    rate_hz: float | None = None
    #: What was left out, one sentence each; empty unless opened with ``keep_going``.
    problems: tuple[str, ...] = ()
    #: Component sizes by which it is scored: ``anomaly`` or ``obstacle`` (SegmentMeIfYouCan).
    track: str = 'anomaly'
    #: The split that was opened, where the source has splits.
    split: str | None = None
    #: Whose ids the labels are, a key of ``classes.CLASS_SETS``; None: those of the model.
    class_set: str | None = None

    @property
    @abstractmethod
    def frame_ids(self) -> list[str]:
        """Names of the frames in order; unique, usable as file names."""

    @abstractmethod
    def __getitem__(self, index: int) -> Frame:
        """
        Read one frame.

        Raises
        ------
        IndexError
            If ``index`` is out of range.
        UserError
            If the frame cannot be read; names the file.

        """

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.frame_ids)

    def __iter__(self) -> Iterator[Frame]:
        """Read the frames one after the other."""
        for index in range(len(self)):
            yield self[index]

    def shortfall(self) -> str | None:
        """Return '15 of 30' where only so many of a benchmark's frames are here, else None."""
        return None

    def check(self, limit: int | None = None) -> list[str]:
        """Return one sentence for each thing that is wrong with the first ``limit`` frames."""
        return list(self.problems)


def natural_key(text: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts ``2`` before ``10``, and digits before letters."""
    parts = re.split(r'([0-9]+)', text)
    # Every second part is digits, the others are text, also when they are empty.
    return [(place % 2 == 0 and part != '', int(part) if place % 2 else 0,
             '' if place % 2 else part) for place, part in enumerate(parts)]
