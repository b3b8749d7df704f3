# SPDX-License-Identifier: Apache-2.0
"""
Fishyscapes' validation sets (Blum et al., IJCV 2021): Lost & Found and Static.

Masks: 0 in-distribution, 1 anomaly, 255 void.
"""

from pathlib import Path
from typing import ClassVar

from anomaly_seg_ros.datasets.paired import IMAGE, Layout, Pair, PairedDataset, simple_layout
from anomaly_seg_ros.datasets.reading import file_size_hw, read_image
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import array_error
import numpy as np

_LOST_AND_FOUND_IMAGE = rf'leftImg8bit/(?:train|test)/[^/]+/(?P<a>[^/]+)_leftImg8bit\.{IMAGE}'
_LOST_AND_FOUND_MASK = r'fishyscapes_lostandfound/\d+_(?P<a>[^/]+)_labels\.(?i:png)'


class FsLostAndFound(PairedDataset):
    """
    Fishyscapes Lost & Found: 100 frames of Lost & Found with new, finer masks.

    The masks come from Fishyscapes, the images from the Lost & Found data set; the masks say
    which images count. Component sizes are those of the anomaly track, by which
    road-anomaly-benchmark scores it (FishyLAFAnomaly-val).
    """

    name = 'fs_lost_and_found'
    frame_counts: ClassVar[dict[str | None, int]] = {None: 100}
    source = ('https://fishyscapes.com/dataset (fishyscapes_lostandfound.zip) and the '
              'Lost & Found data set (leftImg8bit.zip)')
    layouts = (
        Layout('fishyscapes_lostandfound/NNNN_FRAME_labels.png with '
               'leftImg8bit/(train|test)/SEQUENCE/FRAME_leftImg8bit.png',
               _LOST_AND_FOUND_IMAGE, _LOST_AND_FOUND_MASK,
               ('leftImg8bit', 'fishyscapes_lostandfound'), frames='masks'),
        Layout('fishyscapes_lostandfound/NNNN_FRAME_labels.png with '
               'lostandfound/leftImg8bit/(train|test)/SEQUENCE/FRAME_leftImg8bit.png',
               f'lostandfound/{_LOST_AND_FOUND_IMAGE}', _LOST_AND_FOUND_MASK,
               ('lostandfound/leftImg8bit', 'fishyscapes_lostandfound'), frames='masks'),
        Layout('fishyscapes_lostandfound/NNNN_FRAME_labels.png with '
               'laf_images/FRAME_leftImg8bit.png',
               rf'laf_images/(?P<a>[^/]+)_leftImg8bit\.{IMAGE}', _LOST_AND_FOUND_MASK,
               ('laf_images', 'fishyscapes_lostandfound'), frames='masks'),
        Layout('labels/val/FRAME_fishy-labels.png with '
               'leftImg8bit/(train|test)/SEQUENCE/FRAME_leftImg8bit.png',
               _LOST_AND_FOUND_IMAGE, r'labels/val/(?P<a>[^/]+)_fishy-labels\.(?i:png)',
               ('leftImg8bit', 'labels/val'), frames='masks'),
        simple_layout(),
        simple_layout(images='original', masks='labels'),
    )


class FsStatic(PairedDataset):
    """
    Fishyscapes Static: 30 Cityscapes validation images with pasted objects.

    The archives hold differences to Cityscapes images (``*_rgb.npz``); with those, the images are
    put together here and ``cityscapes`` says where Cityscapes is. Some frames hold no anomaly.
    """

    name = 'fs_static'
    frame_counts: ClassVar[dict[str | None, int]] = {None: 30}
    source = 'https://fishyscapes.com/dataset (fs_val_v3.zip) and Cityscapes (leftImg8bit/val)'
    layouts = (
        *(Layout('fs_static_images_v(1|2|3)/NNNN_FRAME_rgb.png with '
                 'fs_val_v(1|2|3)/NNNN_FRAME_labels.png',
                 rf'fs_static_images_v{version}/(?P<a>\d+_[^/]+)_rgb\.{IMAGE}',
                 rf'fs_val_v{version}/(?P<a>\d+_[^/]+)_labels\.(?i:png)',
                 (f'fs_static_images_v{version}', f'fs_val_v{version}'))
          for version in (3, 2, 1)),
        *(Layout('fs_val_v(1|2|3)/NNNN_FRAME_(rgb.npz|labels.png) with Cityscapes beside it',
                 rf'{folder}/(?P<a>\d+_[^/]+)_rgb\.npz',
                 rf'{folder}/(?P<a>\d+_[^/]+)_labels\.(?i:png)',
                 (folder,))
          for folder in ('fs_val_v3', 'fs_val_v2', 'fs_val_v1', 'fishyscapes-3.0.0',
                         'fishyscapes-2.0.0', 'fishyscapes-1.0.0')),
        simple_layout(),
        simple_layout(images='original', masks='labels'),
    )

    def __init__(self, root: Path | str, *, cityscapes: Path | str | None = None,
                 split: str | None = None, keep_going: bool = False) -> None:
        """
        Find and pair the files.

        Parameters
        ----------
        root, split, keep_going
            See :class:`PairedDataset`.
        cityscapes
            Folder of Cityscapes, which holds leftImg8bit/val; only needed for the archives of
            differences. None looks in ``root`` and ``root``/cityscapes.

        """
        base = Path(root)
        candidates = [Path(cityscapes)] if cityscapes else [base, base / 'cityscapes']
        self._cityscapes = next((path / 'leftImg8bit' / 'val' for path in candidates
                                 if (path / 'leftImg8bit' / 'val').is_dir()), None)
        super().__init__(root, split=split, keep_going=keep_going)
        if self._cityscapes is None and self._pairs[0].image.suffix == '.npz':
            raise UserError(
                f'{root}: the images are differences to Cityscapes, but there is no '
                f'leftImg8bit/val in {", ".join(map(str, candidates))}. '
                'Give the folder of Cityscapes with the option cityscapes.')

    def _read_image(self, pair: Pair) -> np.ndarray:
        if pair.image.suffix != '.npz':
            return read_image(pair.image)
        original = self._original(pair)
        image = read_image(original)
        try:
            with np.load(pair.image) as archive:
                difference = archive['rgb']
        # A damaged archive raises zipfile, zlib, pickle and key errors.
        except Exception as error:
            raise UserError(f'{pair.image}: not a readable archive with an array rgb '
                            f'({array_error(error)}). Download it again.') from error
        if difference.shape != image.shape:
            raise UserError(f'{pair.image}: rgb must have the shape {image.shape} of {original}, '
                            f'got {difference.shape}. Download both again.')
        together: np.ndarray = np.clip(image.astype(np.int32) + difference.astype(np.int32),
                                       0, 255).astype(np.uint8)
        return together

    def _image_size_hw(self, pair: Pair) -> tuple[int, int]:
        return file_size_hw(self._original(pair) if pair.image.suffix == '.npz' else pair.image)

    def _original(self, pair: Pair) -> Path:
        """0000_frankfurt_000001_046504_rgb.npz -> frankfurt/frankfurt_000001_046504_left..."""
        frame = pair.frame_id.split('_', 1)[1]
        return (self._cityscapes or self.root) / frame.split('_')[0] / f'{frame}_leftImg8bit.png'
