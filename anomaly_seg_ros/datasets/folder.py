# SPDX-License-Identifier: Apache-2.0
"""A plain folder of images and masks, described by a small YAML file."""

from pathlib import Path
import posixpath
import re
from typing import Any

from anomaly_seg_ros.datasets.paired import Codes, IMAGE, Layout, PairedDataset
from anomaly_seg_ros.errors import UserError
import yaml

CONFIG_NAME = 'dataset.yaml'
_MEANINGS = {'in-distribution': 0, 'anomaly': 1, 'void': 255}
_KEYS = ('name', 'images', 'image_suffix', 'masks', 'mask_suffix', 'anomaly', 'labels')
EXAMPLE = """\
name: yard              # for reports
images: images          # folder of the images, sub-folders included
masks: labels           # folder of the masks: the same names, PNG
image_suffix: ''        # what image names have at their end and mask names have not
mask_suffix: _labels    # what mask names have at their end and image names have not
anomaly:                # code in the mask -> in-distribution, anomaly or void
  0: in-distribution
  1: anomaly
  255: void
labels:                 # code -> class id, 255 unlabelled; may be left out, as may anomaly
  0: 0
  1: 255
  255: 255
"""


class LabelledFolder(PairedDataset):
    """Images and masks of your own; ``dataset.yaml`` in the folder says what the codes mean."""

    name = 'folder'
    class_set = None

    def __init__(self, root: Path | str, *, config: Path | str | None = None,
                 split: str | None = None, keep_going: bool = False) -> None:
        """
        Read the description, then find and pair the files.

        Parameters
        ----------
        root, split, keep_going
            See :class:`PairedDataset`.
        config
            The YAML file; None takes ``root``/dataset.yaml.

        Raises
        ------
        UserError
            If the YAML file is missing or wrong; names the key and shows an example.

        """
        path = Path(config) if config else Path(root) / CONFIG_NAME
        settings = _read_settings(path)
        images, masks = settings['images'], settings['masks']
        image_end, mask_end = settings.get('image_suffix', ''), settings.get('mask_suffix', '')
        # In one folder the longer suffix tells; masks are matched first.
        not_image = f'(?<!{re.escape(image_end)})' \
            if images == masks and len(image_end) > len(mask_end) else ''
        self._config, self._suffixes = path, (image_end, mask_end)
        # Set on the instance: each folder has a layout of its own.
        self.name = settings.get('name', Path(root).resolve().name)
        self.layouts = (Layout(  # type: ignore[misc]
            f'{images}/**/NAME{image_end}.(png|jpg|webp) with {masks}/**/NAME{mask_end}.png, as '
            f'{path} says',
            rf'{_below(images, masks)}(?P<a>.+){re.escape(image_end)}\.{IMAGE}',
            rf'{_below(masks, images)}(?P<a>.+){re.escape(mask_end)}{not_image}\.(?i:png)',
            tuple('' if folder == '.' else folder for folder in (images, masks)),
            Codes(_anomaly_codes(path, settings), _label_codes(path, settings))),)
        super().__init__(root, split=split, keep_going=keep_going)

    def _remedy(self) -> str:
        return ('Add the missing files, remove those that have no partner, or set image_suffix '
                f'and mask_suffix in {self._config}, which are {self._suffixes[0]!r} and '
                f'{self._suffixes[1]!r}: without them an image and its mask have one name.')


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise _wrong(path, f'cannot be read ({error.strerror or error})') from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _wrong(path, f'is no YAML ({error})') from error
    if not isinstance(settings, dict):
        raise _wrong(path, f'must hold keys and values, got {type(settings).__name__}')
    unknown = [str(key) for key in settings if key not in _KEYS]
    if unknown:
        raise _wrong(path, f'has unknown keys: {", ".join(unknown)}')
    for key in ('images', 'masks'):
        value = settings.get(key)
        if not isinstance(value, str) or not value.strip():
            raise _wrong(path, f'needs {key}: a folder, got {value!r}')
        if value.startswith('/'):
            raise _wrong(path, f'{key}: must be a folder below the root, got the absolute path '
                         f'{value}')
        settings[key] = posixpath.normpath(value)
    for key in ('name', 'image_suffix', 'mask_suffix'):
        if not isinstance(settings.get(key, ''), str):
            raise _wrong(path, f'needs text for {key}, got {settings[key]!r}')
    if settings['images'] == settings['masks'] and \
            settings.get('image_suffix', '') == settings.get('mask_suffix', ''):
        raise _wrong(path, 'has images and masks in one folder with equal suffixes, so they '
                     'cannot be told apart')
    if not settings.get('anomaly') and not settings.get('labels'):
        raise _wrong(path, 'needs anomaly, labels or both')
    return settings


def _below(folder: str, other: str) -> str:
    """Give a regular expression for the start of paths in ``folder``, not in ``other`` below."""
    start, elsewhere = ('' if name == '.' else re.escape(f'{name}/') for name in (folder, other))
    nested = other != folder and elsewhere.startswith(start)
    return f'(?!{elsewhere}){start}' if nested else start


def _anomaly_codes(path: Path, settings: dict[str, Any]) -> dict[int, int] | None:
    table = settings.get('anomaly')
    if not table:
        return None
    codes = {}
    for code, meaning in _items(path, 'anomaly', table):
        if meaning not in _MEANINGS:
            raise _wrong(path, f'anomaly: code {code} must mean one of {", ".join(_MEANINGS)}, '
                         f'got {meaning!r}')
        codes[code] = _MEANINGS[meaning]
    return codes


def _label_codes(path: Path, settings: dict[str, Any]) -> dict[int, int] | None:
    table = settings.get('labels')
    if not table:
        return None
    codes = {}
    for code, train in _items(path, 'labels', table):
        if not isinstance(train, int) or isinstance(train, bool) or not 0 <= train <= 255:
            raise _wrong(path, f'labels: code {code} must be a train id 0 to 255, got {train!r}')
        codes[code] = train
    return codes


def _items(path: Path, key: str, table: Any) -> list[tuple[int, Any]]:
    if not isinstance(table, dict):
        raise _wrong(path, f'{key} must map codes, got {type(table).__name__}')
    for code in table:
        if not isinstance(code, int) or isinstance(code, bool) or not 0 <= code <= 255:
            raise _wrong(path, f'{key}: codes are whole numbers 0 to 255, got {code!r}')
    return list(table.items())


def _wrong(path: Path, what: str) -> UserError:
    return UserError(f'{path}: {what}. Write it like this:\n{EXAMPLE}')
