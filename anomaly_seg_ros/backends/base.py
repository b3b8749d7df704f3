# SPDX-License-Identifier: Apache-2.0
"""What every backend promises: open a model file, run frames, say what runs where."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from anomaly_seg_ros.model_card import ModelCard, ModelFile
from anomaly_seg_ros.ports import NetworkOutput
import numpy as np


class Backend(ABC):
    """
    A model opened on a device; not safe for use by two threads at once.

    Attributes
    ----------
    name
        Its name in ``BACKENDS``.
    card
        The model's card.
    input_buffer
        Where the backend reads its input fastest (pinned memory), or None. Giving this very array
        to ``run`` saves a copy.

    """

    name: str
    card: ModelCard
    input_buffer: np.ndarray | None = None

    @abstractmethod
    def __init__(self, model: ModelFile, **options: Any) -> None:
        """Open ``model``; see each backend for its options."""

    @classmethod
    @abstractmethod
    def unavailable(cls, model: ModelFile) -> str | None:
        """Tell why ``model`` cannot run here on this backend, or None where it can."""

    @abstractmethod
    def run(self, network_input: np.ndarray) -> NetworkOutput:
        """
        Run one frame: float32 (1, 3, h, w), or uint8 (H, W, 3) for a ``device`` model.

        The arrays returned stay valid until the next call.

        Raises
        ------
        ValueError
            If the input has another type or shape than the card says.

        """

    @abstractmethod
    def describe(self) -> Mapping[str, str]:
        """Tell what runs where, for reports and diagnostics."""

    @abstractmethod
    def close(self) -> None:
        """Free the device; the backend cannot run afterwards."""

    def __enter__(self) -> 'Backend':
        """Return the backend itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Close."""
        self.close()
