# SPDX-License-Identifier: Apache-2.0
"""
Image folders beside mask folders: what all benchmark adapters share.

An adapter is a table: which layouts people have on their disks, what the codes in the masks mean
and which splits there are. Images and masks pair by name, never by position, and a code that the
table does not know stops the run.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
import os
from pathlib import Path
import re
from typing import ClassVar, Literal

from anomaly_seg_ros.datasets.frame import Frame
from anomaly_seg_ros.datasets.reading import codes_in, file_size_hw, read_image, read_mask
from anomaly_seg_ros.datasets.source import FrameSource, natural_key
from anomaly_seg_ros.errors import UserError
import numpy as np

IMAGE = r'(?i:png|jpg|jpeg|webp)'
_SHOWN = 8
_THREADS = 4


@dataclass(frozen=True)
class Codes:
    """
    What the codes in a mask file mean; a code that is in neither table is an error.

    Attributes
    ----------
    anomaly
        Code -> 0 in-distribution, 1 anomaly, 255 void; None where masks say nothing about it.
    labels
        Code -> train id, 255 unlabelled; None where masks say nothing about it.

    """

    anomaly: Mapping[int, int] | None = None
    labels: Mapping[int, int] | None = None

    @property
    def known(self) -> frozenset[int]:
        """All codes that may occur."""
        return frozenset(self.anomaly or ()) | frozenset(self.labels or ())


#: SegmentMeIfYouCan's and Fishyscapes' codes.
BINARY = Codes(anomaly={0: 0, 1: 1, 255: 255})


@dataclass(frozen=True)
class Layout:
    """
    One way in which people have a data set on disk.

    ``images`` and ``masks`` are regular expressions for whole paths relative to the root; their
    groups ``a``, ``b``, ... make up the frame's name and are equal in an image and its mask.
    Words in braces are replaced by the adapter's :meth:`PairedDataset._variables`.

    Attributes
    ----------
    text
        The layout in words, for the error message.
    images, masks
        Regular expressions for whole paths relative to the root, with forward slashes.
    folders
        Folders below the root that must be there and are searched; ``.`` is the root without
        what is below it, an empty name the root with it.
    codes
        Meaning of the mask's codes.
    frames
        ``both``: each image needs its mask and each mask its image; ``masks``: the masks say
        which images count; ``images``: the images count, with or without a mask.
    splits
        Splits that this layout can have; empty: all of the adapter's.

    """

    text: str
    images: str
    masks: str
    folders: tuple[str, ...]
    codes: Codes = BINARY
    frames: Literal['both', 'masks', 'images'] = 'both'
    splits: tuple[str, ...] = ()


def simple_layout(codes: Codes = BINARY, splits: tuple[str, ...] = (), images: str = 'images',
                  masks: str = 'labels_masks') -> Layout:
    """Return the layout ``images/NAME.*`` with ``labels_masks/NAME.png``."""
    return Layout(f'{images}/NAME.(png|jpg|webp) with {masks}/NAME.png',
                  rf'{images}/(?P<a>[^/]+)\.{IMAGE}', rf'{masks}/(?P<a>[^/]+)\.(?i:png)',
                  (images, masks), codes, splits=splits)


@dataclass(frozen=True)
class Pair:
    """One frame's files."""

    frame_id: str
    image: Path
    mask: Path | None


@dataclass
class Found:
    """What discovery found: frames in any order, one sentence for each misfit, all the files."""

    layout: Layout
    split: str | None
    pairs: list[Pair] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    files: frozenset[Path] = frozenset()


class PairedDataset(FrameSource):
    """Base of the adapters; subclasses fill in the class attributes."""

    class_set: str | None = 'cityscapes'
    #: Splits in the order in which they are tried when none is asked for; empty: no splits.
    splits: ClassVar[tuple[str, ...]] = ()
    #: Split (None: there are no splits) -> frames of the complete download, where that is known.
    frame_counts: ClassVar[Mapping[str | None, int]] = {}
    #: Layouts in the order in which they are tried.
    layouts: ClassVar[tuple[Layout, ...]] = ()
    #: Folder names that archives unpack to; tried below the root too.
    nested: ClassVar[tuple[str, ...]] = ()
    #: Where the data comes from, for the error message.
    source: ClassVar[str] = ''

    def __init__(self, root: Path | str, *, split: str | None = None,
                 keep_going: bool = False) -> None:
        """
        Find and pair the files; no pixels are read.

        Parameters
        ----------
        root
            The folder that was downloaded.
        split
            One of ``splits``; None takes the first that is there. One of which only images or only
            masks are there is not passed over: its files do not pair.
        keep_going
            Leave unpaired files out and list them in ``problems`` instead of raising.

        Raises
        ------
        UserError
            If ``root`` holds none of the layouts (says what was looked for and what is there), or
            files do not pair and ``keep_going`` is False.

        """
        self.root = Path(root)
        if split is not None and split not in self.splits:
            raise UserError(f'{self.name} has no split {split!r}. '
                            + (f'Choose one of {", ".join(self.splits)}.' if self.splits
                               else 'Leave the split out.'))
        found = self._find(split)
        self.split = found.split
        self._codes = found.layout.codes
        pairs = self._select(found)
        self._pairs = sorted(pairs, key=lambda pair: natural_key(pair.frame_id))
        self.problems = tuple(found.problems)
        if self.problems and not (keep_going and self._pairs):
            more = f'\n  and {len(self.problems) - _SHOWN} more' \
                if len(self.problems) > _SHOWN else ''
            raise UserError(f'{root}: {len(self.problems)} files of {self._title()} do not pair:'
                            '\n  ' + '\n  '.join(self.problems[:_SHOWN]) + f'{more}\n'
                            + self._remedy())
        if not self._pairs:
            raise UserError(f'{root}: no frame of {self._title()} is complete. '
                            'Download the data set again.')

    @property
    def frame_ids(self) -> list[str]:
        """Names of the frames in natural order."""
        return [pair.frame_id for pair in self._pairs]

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self._pairs)

    def shortfall(self) -> str | None:
        """Return '15 of 30' where only so many of a benchmark's frames are here, else None."""
        complete = self.frame_counts.get(self.split, 0)
        return f'{len(self)} of {complete}' if len(self) < complete else None

    def __getitem__(self, index: int) -> Frame:
        """
        Read one frame.

        Raises
        ------
        UserError
            If a file is unreadable, the mask has another size than the image, or the mask holds
            codes that this data set does not have.

        """
        pair = self._pairs[index]
        image = self._read_image(pair)
        if pair.mask is None:
            return Frame(pair.frame_id, image)
        mask = read_mask(pair.mask)
        self._check_mask(pair, mask, image.shape[:2])
        return Frame(pair.frame_id, image, _translate(mask, self._codes.anomaly),
                     _translate(mask, self._codes.labels))

    def check(self, limit: int | None = None) -> list[str]:
        """Read headers of the images and codes of the masks; list everything that is wrong."""
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(self._check_pair, self._pairs[:limit])
            return [*self.problems, *(problem for problems in found for problem in problems)]

    def _check_pair(self, pair: Pair) -> list[str]:
        problems: list[str] = []
        size_hw: tuple[int, ...] | None = None
        try:
            size_hw = self._image_size_hw(pair)
        except UserError as error:
            problems.append(str(error))
        try:
            if pair.mask is not None:
                mask = read_mask(pair.mask)
                self._check_mask(pair, mask, size_hw or mask.shape)
        except UserError as error:
            problems.append(str(error))
        return problems

    def _title(self) -> str:
        return f'{self.name} ({self.split})' if self.split else self.name

    def _remedy(self) -> str:
        """Say what to do about files that do not pair."""
        others = [split for split in self.splits if split != self.split]
        choose = f', or choose another split ({", ".join(others)})' if others else ''
        return f'Download the missing files, or remove those that have no partner{choose}.'

    def _variables(self, split: str | None) -> dict[str, str]:
        """Give regular expressions for the words in braces in the layouts."""
        return {'split': split or ''}

    def _select(self, found: Found) -> list[Pair]:
        """Leave out frames that the split does not have; may add to ``found.problems``."""
        return found.pairs

    def _image_size_hw(self, pair: Pair) -> tuple[int, int]:
        return file_size_hw(pair.image)

    def _read_image(self, pair: Pair) -> np.ndarray:
        return read_image(pair.image)

    def _check_mask(self, pair: Pair, mask: np.ndarray, size_hw: tuple[int, ...]) -> None:
        if mask.shape != tuple(size_hw):
            raise UserError(f'{pair.mask}: the mask has {mask.shape[1]}x{mask.shape[0]} pixels, '
                            f'its image {pair.image.name} {size_hw[1]}x{size_hw[0]}. '
                            'They do not belong together; masks are never resized.')
        strange = [code for code in codes_in(mask) if code not in self._codes.known]
        if strange:
            known = _ranges(self._codes.known)
            raise UserError(f'{pair.mask}: masks of {self.name} hold {known}, '
                            f'this one has also {_ranges(strange)}. It belongs to another data '
                            'set, or was saved in colour or with another palette.')

    def _find(self, split: str | None) -> Found:
        if not self.root.is_dir():
            raise UserError(f'{self.root}: no such folder. Give the folder of {self.name}'
                            f'{f", from {self.source}" if self.source else ""}.')
        half: Found | None = None
        for candidate in (split,) if split else self.splits or (None,):
            found = self._look(candidate)
            if found is None:
                continue
            if found.pairs:
                # The same files may be whole as another split: images that need no masks there.
                return found if half is None or half.files & found.files else half
            half = half or found
        if half is not None:
            return half
        looked = '\n  '.join(dict.fromkeys(layout.text for layout in self.layouts))
        there = sorted((path.name + '/' * path.is_dir() for path in self.root.iterdir()),
                       key=natural_key)
        more = f' and {len(there) - _SHOWN} more' if len(there) > _SHOWN else ''
        wanted = f' with the split {split}' if split else ''
        others = [other for other in self.splits if other != split and split is not None
                  and (found := self._look(other)) is not None and found.pairs]
        if others:
            raise UserError(f'{self.root}: no {self.name}{wanted} here, but '
                            f'{", ".join(others)}. Choose another split or download this one.')
        origin = f' It comes from {self.source}.' if self.source else ''
        raise UserError(
            f'{self.root}: no {self.name}{wanted} here. Looked for\n  {looked}\n'
            f'and found {", ".join(there[:_SHOWN]) or "nothing"}{more}. '
            f'Give the folder that holds what was looked for.{origin}')

    def _look(self, split: str | None) -> Found | None:
        """Return the first layout of the split with a frame, else the first with any file."""
        half: Found | None = None
        for root in (self.root, *(self.root / name for name in self.nested)):
            for layout in self.layouts:
                found = self._try(root, layout, split)
                if found is not None and found.pairs:
                    return found
                half = half or found
        return half

    def _try(self, root: Path, layout: Layout, split: str | None) -> Found | None:
        """Pair the files of one layout; None where the root does not have it."""
        if (layout.splits and split not in layout.splits) or any(
                not (root / name).is_dir() for name in layout.folders):
            return None
        patterns = []
        for pattern in (layout.masks, layout.images):
            for name, value in self._variables(split).items():
                pattern = pattern.replace('{' + name + '}', value)
            patterns.append(re.compile(pattern))
        masks: dict[str, Path] = {}
        images: dict[str, Path] = {}
        problems = []
        for path, relative in _files(root, layout.folders):
            for table, expression in zip((masks, images), patterns, strict=True):
                match = expression.fullmatch(relative)
                if match is None:
                    continue
                frame_id = '_'.join(match[name] for name in sorted(match.groupdict()))
                frame_id = frame_id.replace('/', '_')
                if frame_id in table:
                    problems.append(f'{path}: its frame name {frame_id} is that of '
                                    f'{table[frame_id]} too')
                else:
                    table[frame_id] = path
                break
        if not {'both': {**images, **masks}, 'masks': masks, 'images': images}[layout.frames]:
            return None
        pairs = [Pair(name, path, masks.get(name)) for name, path in images.items()
                 if name in masks or layout.frames == 'images']
        if layout.frames == 'both':
            problems += [f'{path}: no mask' for name, path in images.items() if name not in masks]
        problems += [f'{path}: no image' for name, path in masks.items() if name not in images]
        return Found(layout, split if self.splits else None, pairs, problems,
                     frozenset((*images.values(), *masks.values())))


def keep_by_codes(found: Found, keep: Callable[[list[int]], bool]) -> list[Pair]:
    """Keep the frames whose mask's codes please ``keep``; reads every mask."""
    def decide(pair: Pair) -> bool | UserError:
        if pair.mask is None:
            return False
        try:
            return keep(codes_in(read_mask(pair.mask)))
        except UserError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        decisions = list(pool.map(decide, found.pairs))
    found.problems += [str(decision) for decision in decisions if isinstance(decision, UserError)]
    return [pair for pair, decision in zip(found.pairs, decisions, strict=True)
            if decision is True]


def _files(root: Path, folders: tuple[str, ...]) -> list[tuple[Path, str]]:
    """List the files below ``folders``, each with its path relative to ``root``, sorted."""
    paths = set()
    for name in folders:
        # People link single folders of a big data set into place.
        for folder, below, files in os.walk(root / name, followlinks=True):
            # Hidden files are no frames: macOS puts a ._NAME beside each NAME.
            paths |= {Path(folder, file) for file in files if not file.startswith('.')}
            below[:] = [] if name == '.' else [
                entry for entry in below if not entry.startswith('.')]
    return [(path, path.relative_to(root).as_posix())
            for path in sorted(paths, key=lambda path: natural_key(path.as_posix()))]


def _translate(mask: np.ndarray, table: Mapping[int, int] | None) -> np.ndarray | None:
    if table is None:
        return None
    lookup = np.full(256, 255, np.uint8)
    for code, value in table.items():
        lookup[code] = value
    translated: np.ndarray = lookup[mask]
    return translated


def _ranges(codes: 'frozenset[int] | list[int]') -> str:
    """``[0, 1, 2, 255]`` -> ``0-2, 255``."""
    parts: list[list[int]] = []
    for code in sorted(codes):
        if parts and code == parts[-1][1] + 1:
            parts[-1][1] = code
        else:
            parts.append([code, code])
    return ', '.join(f'{low}' if low == high else f'{low}-{high}' for low, high in parts)
