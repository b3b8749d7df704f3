# SPDX-License-Identifier: Apache-2.0
"""Names of classes other than Cityscapes', and from them palette and drivable classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anomaly_seg_ros.classes import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE
from anomaly_seg_ros.errors import UserError

# Road surface and what is painted on or let into it, as Cityscapes, Mapillary Vistas, BDD100K,
# IDD, StreetHazards and ADE20K call it.
DRIVABLE_NAMES = frozenset({
    'road', 'lane', 'drivable area', 'street lines', 'roadlines', 'road line', 'road marking',
    'service lane', 'bike lane', 'lane marking - general', 'lane marking - crosswalk',
    'crosswalk - plain', 'crosswalk', 'manhole', 'catch basin', 'pothole', 'dirt track'})

# A class that stands for everything unnamed.
VOID_NAMES = frozenset({'void', 'background', 'unlabeled', 'unlabelled', 'ignore'})


def drivable_classes(classes: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of the classes that a vehicle may drive on, by their names."""
    return tuple(i for i, name in enumerate(classes) if name.strip().lower() in DRIVABLE_NAMES)


def void_class(classes: Sequence[str]) -> int | None:
    """Return the id of the class that means void or background, None where there is none."""
    return next((i for i, name in enumerate(classes) if name.strip().lower() in VOID_NAMES), None)


def class_names(id2label: Mapping[Any, Any], path: Path) -> tuple[str, ...]:
    """
    Return a checkpoint's names of classes in the order of their ids.

    Raises
    ------
    UserError
        If the ids are not 0 to n - 1, as numbers or as text; names ``path``.

    """
    names = {str(number): str(name) for number, name in id2label.items()}
    order = [str(number) for number in range(len(names))]
    if set(names) != set(order):
        found = ', '.join(sorted(names, key=lambda number: (len(number), number))[:3])
        raise UserError(f'{path}: id2label must number the {len(names)} classes from 0 to '
                        f'{len(names) - 1}, got {found}, ... Number them in the order in which '
                        'the network gives them.')
    return tuple(names[number] for number in order)


def class_palette(classes: Sequence[str]) -> tuple[tuple[int, int, int], ...]:
    """
    Return a colour for each class: that of Cityscapes where the name is one of its names.

    Other classes take colours whose bits are those of the class id, spread from the highest bit
    down (the rule of the Pascal VOC palette), so that neighbouring ids differ most.
    """
    known = dict(zip(CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, strict=True))
    return tuple(known.get(name.strip().lower(), _spread(index + 1))
                 for index, name in enumerate(classes))


def _spread(index: int) -> tuple[int, int, int]:
    red, green, blue = (
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
        for channel in range(3))
    return red, green, blue
