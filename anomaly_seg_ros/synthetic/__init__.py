# SPDX-License-Identifier: Apache-2.0
"""A procedural road world in numpy and OpenCV: images, labels and, in test drives, obstacles."""

from anomaly_seg_ros.synthetic.drive import random_scene, SyntheticDrive
from anomaly_seg_ros.synthetic.world import CLASSES_USED, WEATHERS

__all__ = ['CLASSES_USED', 'random_scene', 'SyntheticDrive', 'WEATHERS']
