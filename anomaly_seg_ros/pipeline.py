# SPDX-License-Identifier: Apache-2.0
"""
The page to read first: one camera frame in, one detection out.

    frame -> preprocess -> network + score -> upsample -> obstacles -> Detection

The network runs at its own input size. Labels and score come back at the network's output size
and are resized to the camera's resolution; the threshold is applied there, so that the mask lies
on the image to the pixel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
import time

from anomaly_seg_ros.backends.base import Backend
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.memory import Memory
from anomaly_seg_ros.obstacles import (
    find_obstacles, Obstacle, ObstacleSettings, rows_to_search, settings_for)
from anomaly_seg_ros.preprocess import check_image, Preprocessor
from anomaly_seg_ros.resize import nearest_taps
import cv2
import numpy as np

STAGES = ('preprocess', 'network', 'upsample', 'obstacles')
MAPS: dict[str, type] = {'labels': np.uint8, 'anomaly': np.float32, 'mask': np.uint8}


class BadOutput(RuntimeError):
    """The network gave NaN or infinity: there is no answer for this frame."""


class WrongSize(UserError, ValueError):
    """The frame is of another size than the one a ``device`` model was exported for."""


@dataclass(frozen=True)
class Detection:
    """
    The answer for one frame, at the camera's resolution.

    The arrays belong to the pipeline, or are those given as ``out``, and are overwritten by its
    next call; ``copy`` keeps them.

    Attributes
    ----------
    labels
        uint8 (H, W), class ids.
    anomaly
        float32 (H, W), the score; higher is more anomalous.
    mask
        uint8 (H, W), 255 where an obstacle is, else 0.
    obstacles
        The components of ``mask``, largest first.
    stages_ms
        Time of each stage in milliseconds, by the names in ``STAGES``.

    """

    labels: np.ndarray
    anomaly: np.ndarray
    mask: np.ndarray
    obstacles: tuple[Obstacle, ...]
    stages_ms: dict[str, float]

    def copy(self) -> 'Detection':
        """Return a detection with arrays of its own."""
        return replace(self, labels=self.labels.copy(), anomaly=self.anomaly.copy(),
                       mask=self.mask.copy())


class Pipeline:
    """
    One model on one device, with the settings that turn its score into obstacles.

    Attributes
    ----------
    settings
        Threshold, minimum area and region; may be replaced between calls.
    card
        The model's card.

    """

    def __init__(self, backend: Backend, settings: ObstacleSettings | None = None) -> None:
        """
        Take an open backend; without ``settings``, the card's threshold is used.

        Raises
        ------
        UserError
            If the region needs drivable classes and the model has none.

        """
        self.card = backend.card
        self.settings = settings_for(self.card, settings)
        self._backend = backend
        self._preprocess = (Preprocessor(self.card, out=backend.input_buffer)
                            if self.card.input_variant == 'host' else None)
        self._maps = {name: Memory(dtype) for name, dtype in MAPS.items()}
        self._swapped = np.empty((0, 0, 3), np.uint8)

    def __call__(self, image: np.ndarray, channel_order: str = 'rgb',
                 out: Mapping[str, np.ndarray] | None = None,
                 size_hw: tuple[int, int] | None = None) -> Detection:
        """
        Answer one frame.

        Parameters
        ----------
        image
            uint8 (H, W, 3), any size (the card's ``frame_size_hw`` for a ``device`` model).
        channel_order
            ``rgb`` or ``bgr``.
        out
            Arrays of the answer's size to write maps into, by the names and types in ``MAPS``.
            Only labels and score that the network gives at that size itself are not written there.
        size_hw
            Size of the answer, where it is not that of the image because the image is a reduced
            one of the camera's.

        Raises
        ------
        ValueError
            If the image is of another type or shape; ``WrongSize`` for a ``device`` model.
        BadOutput
            If the score is not finite everywhere.

        """
        check_image(image, channel_order)
        size_hw = size_hw or image.shape[:2]
        clock = [time.perf_counter()]

        if self._preprocess is None:
            network_input = self._whole_frame(image, channel_order)
        else:
            network_input = self._preprocess(image, channel_order,
                                             reduced=size_hw != image.shape[:2])
        clock.append(time.perf_counter())

        output = self._backend.run(network_input)
        # A sum is finite only if every summand is (float64 cannot overflow from float32).
        if not np.isfinite(cv2.sumElems(output.anomaly)[0]):
            raise BadOutput(f'score {self.card.score!r} is not finite everywhere in this frame')
        clock.append(time.perf_counter())

        maps = {name: out[name] if out and name in out else own.array(size_hw)
                for name, own in self._maps.items()}
        labels, anomaly = resize_output(output.labels, output.anomaly, size_hw,
                                        maps['labels'], maps['anomaly'])
        clock.append(time.perf_counter())

        rows = slice(None) if anomaly is output.anomaly else rows_to_search(
            output.anomaly, self.settings.threshold, size_hw[0])
        mask, obstacles = find_obstacles(anomaly, self.settings, output.labels,
                                         self.card.drivable, maps['mask'], rows)
        clock.append(time.perf_counter())

        stages_ms = {name: (after - before) * 1e3
                     for name, before, after in zip(STAGES, clock, clock[1:], strict=False)}
        return Detection(labels, anomaly, mask, obstacles, stages_ms)

    def warm_up(self, frame_size_hw: tuple[int, int] | None = None, runs: int = 3) -> None:
        """Run on grey frames, so that the first real frame is as fast as the others."""
        size = self.card.frame_size_hw or frame_size_hw or self.card.input_size_hw
        frame = np.full((*size, 3), 127, np.uint8)
        for _ in range(runs):
            self(frame)

    def _whole_frame(self, image: np.ndarray, channel_order: str) -> np.ndarray:
        """Return what a ``device`` graph takes: the frame itself, in the order it was made for."""
        if image.shape[:2] != self.card.frame_size_hw:
            height, width = self.card.frame_size_hw or (0, 0)
            raise WrongSize(f'this model was exported for camera frames of {height}x{width}, got '
                            f'{image.shape[0]}x{image.shape[1]}; export it with that '
                            '--frame-size, or as a host model, which takes any size')
        if channel_order == self.card.frame_channel_order:
            return image
        if self._swapped.shape != image.shape:
            self._swapped = np.empty(image.shape, np.uint8)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=self._swapped)


def resize_output(labels: np.ndarray, anomaly: np.ndarray, size_hw: tuple[int, int],
                  labels_out: np.ndarray | None = None, anomaly_out: np.ndarray | None = None
                  ) -> tuple[np.ndarray, np.ndarray]:
    """
    Resize labels (nearest) and score (bilinear), both with half-pixel centres.

    Parameters
    ----------
    labels, anomaly
        uint8 and float32 (h, w); returned as they are where they have the size already.
    size_hw
        Height and width wanted.
    labels_out, anomaly_out
        Arrays of that size to write into.

    """
    if labels.shape == size_hw:
        return labels, anomaly
    height, width = size_hw
    # What INTER_NEAREST_EXACT gives for both axes at once, in less than half the time.
    columns = cv2.resize(labels, (width, len(labels)), interpolation=cv2.INTER_NEAREST_EXACT)
    labels = np.take(columns, nearest_taps(len(labels), height), axis=0, out=labels_out,
                     mode='clip')  # the other mode buffers the result
    return labels, cv2.resize(anomaly, (width, height), dst=anomaly_out,
                              interpolation=cv2.INTER_LINEAR)
