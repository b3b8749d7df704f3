# SPDX-License-Identifier: Apache-2.0
"""Mean IoU, accuracy and IoU by class from a confusion matrix of the data set (Cityscapes)."""

from collections.abc import Sequence
from dataclasses import dataclass

from anomaly_seg_ros.classes import UNLABELLED
from anomaly_seg_ros.errors import UserError
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class SegmentationMetrics:
    """
    The ``segmentation`` section of metrics.json; fractions.

    A class that is neither labelled nor predicted has IoU None and does not enter ``miou``;
    ``reason`` names those classes.
    """

    miou: float | None
    accuracy: float | None
    iou_by_class: dict[str, float | None]
    pixels: int
    reason: str | None = None


class ConfusionMatrix:
    """
    Counts of (labelled, predicted) class pairs; merges exactly.

    Parameters
    ----------
    class_names
        Name of class id 0, 1 ..; at most 255.

    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)
        # One column more: predictions that are none of the classes, which are wrong.
        self.counts: npt.NDArray[np.int64] = np.zeros(
            (len(self.class_names), len(self.class_names) + 1), np.int64)

    def update(self, predicted: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8],
               frame_id: str) -> None:
        """
        Add one frame.

        Parameters
        ----------
        predicted
            (H, W) uint8 class ids; ids that are no class (255) count as wrong.
        labels
            (H, W) uint8 class ids; 255 = unlabelled, takes no part.
        frame_id
            The name that errors give.

        Raises
        ------
        UserError
            If the shapes differ or a label is no class.

        """
        if predicted.shape != labels.shape:
            raise UserError(f'{frame_id}: the prediction is {predicted.shape} and the labels are '
                            f'{labels.shape}; both must have one size')
        classes = len(self.class_names)
        # Labels are below 256, so every pair has a place in a table of 256 x 256.
        pairs = np.bincount(labels.ravel() * np.int64(256) + predicted.ravel(),
                            minlength=256 * 256).reshape(256, 256)
        foreign = [code for code in np.flatnonzero(pairs.any(axis=1)).tolist()
                   if code >= classes and code != UNLABELLED]
        if foreign:
            raise UserError(f'{frame_id}: labels {foreign[:8]} are none of the {classes} classes '
                            'nor 255 (unlabelled). Map the label codes to the classes first.')
        self.counts[:, :classes] += pairs[:classes, :classes]
        self.counts[:, classes] += pairs[:classes, classes:].sum(axis=1)

    def merge(self, other: 'ConfusionMatrix') -> None:
        """Add the counts of ``other``, which must have the same classes."""
        if self.class_names != other.class_names:
            raise ValueError('merge needs confusion matrices of the same classes')
        self.counts += other.counts

    def result(self) -> SegmentationMetrics:
        """Compute the figures: IoU_c = TP_c / (TP_c + FP_c + FN_c), mIoU their mean."""
        classes = len(self.class_names)
        hits = np.diagonal(self.counts)
        union = self.counts.sum(axis=1) + self.counts[:, :classes].sum(axis=0) - hits
        pixels = int(self.counts.sum())
        iou = {name: int(hit) / int(total) if total else None
               for name, hit, total in zip(self.class_names, hits, union, strict=True)}
        defined = [value for value in iou.values() if value is not None]
        absent = [name for name, value in iou.items() if value is None]
        reason = f'neither labelled nor predicted: {", ".join(absent)}' if absent else None
        if not pixels:
            return SegmentationMetrics(None, None, iou, 0, 'no labelled pixel')
        return SegmentationMetrics(sum(defined) / len(defined), int(hits.sum()) / pixels, iou,
                                   pixels, reason)
