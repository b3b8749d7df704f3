# SPDX-License-Identifier: Apache-2.0
"""
Lost & Found with its own coarse masks (Pinggera et al., IROS 2016): obstacles on the road.

Splits, as road-anomaly-benchmark has them (datasets/tracks.py, tracks_extra.py):

- ``test_no_known``: test images without the sequences whose obstacles are children, pedestrians
  and bicycles, which Cityscapes knows, and without the frames that have no label at all (1,043).
- ``test``, ``train``: everything (1,203 and 1,036); frames without labels are all void.
- ``fishyscapes``: the 100 frames of Fishyscapes' validation set with Lost & Found's masks, less
  the two that have no label; sequences and steps are Fishyscapes' choice. They are in train and
  in test, so one of the two alone is incomplete.
"""

from typing import ClassVar

from anomaly_seg_ros.datasets.paired import (
    Codes, Found, IMAGE, keep_by_codes, Layout, Pair, PairedDataset)

# 0 is everything outside the annotated road, 1 free road, then obstacles by kind.
_CODES = Codes(anomaly={0: 255, 1: 0, **dict.fromkeys(range(2, 201), 1),
                        **dict.fromkeys(range(201, 256), 255)})

_KNOWN_OBJECTS = (
    '15_Rechbergstr_Deckenpfronn', '01_Hanns_Klemm_Str_45_000006', '01_Hanns_Klemm_Str_45_000007',
    '10_Schlossberg_9_000004')

# Sequence -> frame numbers.
_FISHYSCAPES = {
    '01_Hanns_Klemm_Str_45_000000': (80, 140, 200, 230, 260),
    '01_Hanns_Klemm_Str_45_000001': (60, 120, 180, 210, 240),
    '01_Hanns_Klemm_Str_45_000002': (70, 130, 190, 220),
    '01_Hanns_Klemm_Str_45_000003': (30, 90, 150, 180, 210),
    '01_Hanns_Klemm_Str_45_000004': (120, 180, 210),
    '01_Hanns_Klemm_Str_45_000005': (80, 140, 200, 230),
    '01_Hanns_Klemm_Str_45_000008': (60, 120, 180, 240),
    '01_Hanns_Klemm_Str_45_000009': (90, 150, 210),
    '01_Hanns_Klemm_Str_45_000010': (50, 110, 170, 200),
    '01_Hanns_Klemm_Str_45_000011': (50, 110, 170, 200, 230, 260),
    '01_Hanns_Klemm_Str_45_000012': (160, 220, 250, 280),
    '04_Maurener_Weg_8_000000': (30, 90, 150, 180),
    '04_Maurener_Weg_8_000001': (30, 90, 150, 180, 210),
    '04_Maurener_Weg_8_000002': (60, 120, 150),
    '04_Maurener_Weg_8_000003': (30, 90, 120),
    '04_Maurener_Weg_8_000004': (20, 80, 140, 170, 200),
    '04_Maurener_Weg_8_000005': (50, 110, 170, 200),
    '04_Maurener_Weg_8_000006': (40, 100, 130),
    '04_Maurener_Weg_8_000007': (20, 80, 140, 170),
    '04_Maurener_Weg_8_000008': (40, 100, 130, 160, 190),
    '13_Elly_Beinhorn_Str_000000': (50, 110, 170, 230, 260, 290),
    '13_Elly_Beinhorn_Str_000001': (80, 140, 200, 230),
    '13_Elly_Beinhorn_Str_000002': (30, 90, 120),
    '13_Elly_Beinhorn_Str_000003': (80, 140, 200, 260)
}
FISHYSCAPES_FRAMES = frozenset(
    f'{sequence}_{number:06d}' for sequence, numbers in _FISHYSCAPES.items() for number in numbers)


class LostAndFound(PairedDataset):
    """Lost & Found: 1 road, 2 to 200 obstacles, the rest void."""

    name = 'lost_and_found'
    track = 'obstacle'
    source = ('http://wwwlehre.dhbw-stuttgart.de/~sgehrig/lostAndFoundDataset (leftImg8bit.zip, '
              'gtCoarse.zip)')
    splits = ('test_no_known', 'test', 'train', 'fishyscapes')
    frame_counts: ClassVar[dict[str | None, int]] = {
        'test_no_known': 1043, 'test': 1203, 'train': 1036, 'fishyscapes': 98}
    nested = ('lostandfound', 'dataset_LostAndFound')
    layouts = (
        Layout('leftImg8bit/(train|test)/SEQUENCE/FRAME_leftImg8bit.(png|webp|jpg) with '
               'gtCoarse/(train|test)/SEQUENCE/FRAME_gtCoarse_labelIds.png',
               rf'leftImg8bit/{{folder}}/[^/]+/(?P<a>[^/]+)_leftImg8bit\.{IMAGE}',
               r'gtCoarse/{folder}/[^/]+/(?P<a>[^/]+)_gtCoarse_labelIds\.(?i:png)',
               ('leftImg8bit', 'gtCoarse'), _CODES),
    )

    def _variables(self, split: str | None) -> dict[str, str]:
        return {'folder': {'train': 'train', 'fishyscapes': '(?:train|test)'}.get(
            split or '', 'test')}

    def _select(self, found: Found) -> list[Pair]:
        if found.split == 'test_no_known':
            found.pairs = [pair for pair in found.pairs
                           if not pair.frame_id.startswith(_KNOWN_OBJECTS)]
        elif found.split == 'fishyscapes':
            found.pairs = [pair for pair in found.pairs if pair.frame_id in FISHYSCAPES_FRAMES]
            missing = sorted(FISHYSCAPES_FRAMES - {pair.frame_id for pair in found.pairs})
            if missing:
                more = ', ...' if len(missing) > 3 else ''
                found.problems.append(
                    f'{self.root}: {len(missing)} of the {len(FISHYSCAPES_FRAMES)} frames of '
                    f'Fishyscapes are not here: {", ".join(missing[:3])}{more}; they are in '
                    'train and in test')
        else:
            return found.pairs
        return keep_by_codes(found, lambda codes: codes != [0])
