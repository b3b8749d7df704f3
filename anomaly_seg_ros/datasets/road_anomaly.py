# SPDX-License-Identifier: Apache-2.0
"""RoadAnomaly (Lis et al., ICCV 2019): 60 photographs of unusual things on roads."""

from typing import ClassVar

from anomaly_seg_ros.datasets.paired import Codes, IMAGE, Layout, PairedDataset, simple_layout

# The set has no void and calls anomalies 2, not 1.
_CODES = Codes(anomaly={0: 0, 2: 1})


class RoadAnomaly(PairedDataset):
    """RoadAnomaly: 0 in-distribution, 2 anomaly, no void."""

    name = 'road_anomaly'
    frame_counts: ClassVar[dict[str | None, int]] = {None: 60}
    source = 'https://www.epfl.ch/labs/cvlab/data/road-anomaly (RoadAnomaly_jpg)'
    nested = ('RoadAnomaly_jpg', 'RoadAnomaly', 'dataset_RoadAnomaly')
    layouts = (
        Layout('frames/NAME.(jpg|webp) with frames/NAME.labels/labels_semantic.png',
               rf'frames/(?P<a>[^/]+)\.{IMAGE}',
               r'frames/(?P<a>[^/]+)\.labels/labels_semantic\.(?i:png)',
               ('frames',), _CODES),
        simple_layout(_CODES),
        simple_layout(_CODES, images='original', masks='labels'),
    )
