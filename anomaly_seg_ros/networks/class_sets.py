# SPDX-License-Identifier: Apache-2.0
"""Palette and drivable classes for class sets other than Cityscapes, from the classes' names."""

from collections.abc import Sequence

from anomaly_seg_ros.classes import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE

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
