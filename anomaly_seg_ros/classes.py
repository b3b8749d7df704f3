# SPDX-License-Identifier: Apache-2.0
"""Class names and colours of the Cityscapes train ids (Cordts et al., CVPR 2016)."""

from collections.abc import Sequence

from anomaly_seg_ros.errors import UserError
import numpy as np
import numpy.typing as npt

UNLABELLED = 255

CITYSCAPES_CLASSES: tuple[str, ...] = (
    'road', 'sidewalk', 'building', 'wall', 'fence', 'pole', 'traffic light', 'traffic sign',
    'vegetation', 'terrain', 'sky', 'person', 'rider', 'car', 'truck', 'bus', 'train',
    'motorcycle', 'bicycle')

CITYSCAPES_PALETTE: tuple[tuple[int, int, int], ...] = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
    (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
    (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
    (0, 80, 100), (0, 0, 230), (119, 11, 32))

# Indices of the classes a vehicle may drive on.
CITYSCAPES_DRIVABLE: tuple[int, ...] = (0,)

#: What ``FrameSource.class_set`` may name: the classes that a source's labels number.
CLASS_SETS: dict[str, tuple[str, ...]] = {'cityscapes': CITYSCAPES_CLASSES}


def label_ids(classes: Sequence[str], class_set: str | None) -> npt.NDArray[np.uint8]:
    """
    Return the table that turns the ids of a source's labels into those of a model's classes.

    Parameters
    ----------
    classes
        Names of the model's classes.
    class_set
        Whose ids the labels are, as ``FrameSource.class_set``.

    Returns
    -------
    table
        uint8 (256,), indexed by label.

    Raises
    ------
    UserError
        If the model has other classes, so that nothing can be compared.

    """
    table = np.arange(256, dtype=np.uint8)
    if class_set is not None:
        names, own = ([name.strip().lower().replace('_', ' ') for name in each]
                      for each in (CLASS_SETS[class_set], classes))
        if own == [f'label {index}' for index in range(len(names))]:
            return table  # what transformers calls classes without names: taken as these
        if sorted(names) != sorted(own):
            raise UserError(
                f'the labels are those of {class_set} ({len(names)} classes), the model has '
                f'others ({", ".join(classes[:4])}{", ..." if len(classes) > 4 else ""})')
        table[:len(names)] = [own.index(name) for name in names]
    return table
