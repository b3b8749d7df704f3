# SPDX-License-Identifier: Apache-2.0
"""
SegmentMeIfYouCan's RoadAnomaly21 and RoadObstacle21 (Chan et al., NeurIPS 2021).

Frames of a split are told by their names, as the benchmark's own code does it
(road-anomaly-benchmark, datasets/tracks.py and tracks_extra.py). The public archives have masks
for the validation frames only; 0 is in-distribution, 1 anomaly, 255 void.
"""

from typing import ClassVar

from anomaly_seg_ros.datasets.paired import IMAGE, Layout, PairedDataset, simple_layout

_IMAGE = rf'images/(?P<a>{{frames}})\.{IMAGE}'
_MASK = r'labels_masks/(?P<a>{frames})_labels_semantic\.(?i:png)'
# NAME.png too, but nothing else that an archive may have (FRAME_labels_semantic_color.png).
_ANY_MASK = (r'labels_masks/(?!.*_labels_(?!semantic\.))(?P<a>{frames})(?<!_labels_semantic)'
             r'(?:_labels_semantic)?\.(?i:png)')


class _Track(PairedDataset):
    #: Split -> regular expression for the names of its frames.
    frames: ClassVar[dict[str, str]] = {}

    layouts = (
        Layout('images/FRAME.(jpg|webp) with labels_masks/FRAME_labels_semantic.png',
               _IMAGE, _MASK, ('images', 'labels_masks'), splits=('validation',)),
        simple_layout(splits=('validation',)),
        # The test frames' masks are not public; where only some frames have one, all count.
        *(Layout('images/FRAME.(jpg|webp)', _IMAGE, _ANY_MASK, folders, frames='images',
                 splits=('test', 'all', 'night', 'snowstorm'))
          for folders in (('images', 'labels_masks'), ('images',))),
    )

    def _variables(self, split: str | None) -> dict[str, str]:
        return {'frames': self.frames[split or 'validation']}


class RoadAnomaly21(_Track):
    """RoadAnomaly21: 10 labelled validation and 100 test images of anomalies anywhere."""

    name = 'road_anomaly_21'
    source = 'https://segmentmeifyoucan.com/datasets (dataset_AnomalyTrack)'
    nested = ('dataset_AnomalyTrack',)
    splits = ('validation', 'test', 'all')
    frame_counts: ClassVar[dict[str | None, int]] = {'validation': 10, 'test': 100, 'all': 110}
    frames: ClassVar[dict[str, str]] = {
        'validation': r'validation[^/]*', 'test': r'(?!validation)[a-z][^/]*',
        'all': r'[a-z][^/]*'}


class RoadObstacle21(_Track):
    """
    RoadObstacle21: 30 labelled validation images and 382 test images, obstacles on the road.

    The test split leaves night (``driveway``) and snowstorm out, as the benchmark's table does.
    """

    name = 'road_obstacle_21'
    track = 'obstacle'
    source = 'https://segmentmeifyoucan.com/datasets (dataset_ObstacleTrack)'
    nested = ('dataset_ObstacleTrack',)
    splits = ('validation', 'test', 'night', 'snowstorm', 'all')
    frame_counts: ClassVar[dict[str | None, int]] = {'validation': 30, 'test': 327}
    frames: ClassVar[dict[str, str]] = {
        # The benchmark's code leaves these numbers out of its 30 validation frames.
        'validation': r'validation(?!_(?:19|2[1-9]))[^/]*',
        'test': r'(?:curvy-street|one-way-street|gravel|greyasphalt|motorway|paving|darkasphalt'
                r'|darkasphalt2)_[^/]*',
        'night': r'driveway_[^/]*',
        'snowstorm': r'snowstorm[12]_[^/]*',
        'all': r'[a-z][^/]*'}
