# SPDX-License-Identifier: Apache-2.0
"""A folder of images and a video file as frame sources; neither knows the truth."""

from collections.abc import Iterator
from pathlib import Path

from anomaly_seg_ros.datasets.frame import Frame
from anomaly_seg_ros.datasets.reading import file_size_hw, IMAGE_ENDINGS, read_image
from anomaly_seg_ros.datasets.source import FrameSource, natural_key
from anomaly_seg_ros.errors import UserError
import cv2


class ImageFolder(FrameSource):
    """All images directly in a folder, in natural order (2 before 10)."""

    def __init__(self, root: Path | str) -> None:
        """
        List the images of ``root``.

        Raises
        ------
        UserError
            If ``root`` is no folder, holds no image, or holds two images of one name.

        """
        self.root = Path(root)
        self.name = self.root.resolve().name
        if not self.root.is_dir():
            raise UserError(f'{root}: not a folder. Give the folder that holds the images.')
        self._paths = sorted((path for path in self.root.iterdir()
                              if path.suffix.lower() in IMAGE_ENDINGS and path.is_file()
                              and not path.name.startswith('.')),
                             key=lambda path: natural_key(path.name))
        if not self._paths:
            found = sorted({path.suffix or path.name for path in self.root.iterdir()})
            raise UserError(f'{root}: no images ({", ".join(IMAGE_ENDINGS)}) in this folder, only '
                            f'{", ".join(found[:8]) or "nothing"}. Sub-folders are not searched; '
                            'give the folder that holds the images itself.')
        stems = [path.stem for path in self._paths]
        twice = sorted({stem for stem in stems if stems.count(stem) > 1}) \
            if len(set(stems)) < len(stems) else []
        if twice:
            raise UserError(f'{root}: two images have the same name but for the ending: '
                            f'{", ".join(twice[:8])}. Rename or remove one of each.')

    @property
    def frame_ids(self) -> list[str]:
        """File names without their ending."""
        return [path.stem for path in self._paths]

    def __getitem__(self, index: int) -> Frame:
        """Read one image."""
        path = self._paths[index]
        return Frame(path.stem, read_image(path))

    def check(self, limit: int | None = None) -> list[str]:
        """List unreadable files from their headers."""
        problems = []
        for path in self._paths[:limit]:
            if path.suffix.lower() not in ('.png', '.jpg', '.jpeg', '.webp'):
                continue
            try:
                file_size_hw(path)
            except UserError as error:
                problems.append(str(error))
        return problems


class VideoFile(FrameSource):
    """The frames of a video, decoded in order; nothing is held but the current frame."""

    def __init__(self, root: Path | str) -> None:
        """
        Open the video and count its frames by walking through it once without decoding them.

        Raises
        ------
        UserError
            If the file is missing, no video, or has no frames.

        """
        self.root = Path(root)
        self.name = self.root.stem
        if not self.root.is_file():
            raise UserError(f'{root}: no such file. Give a video file.')
        capture = self._open()
        # The container's frame count is an estimate in some formats, so count.
        self._count = 0
        while capture.grab():
            self._count += 1
        rate_hz = float(capture.get(cv2.CAP_PROP_FPS))
        capture.release()
        self.rate_hz = rate_hz if rate_hz > 0 else None
        if not self._count:
            raise UserError(f'{root}: no frame could be read. The file is damaged or its codec is '
                            'unknown to OpenCV; convert it to H.264 in MP4.')
        self._capture: cv2.VideoCapture | None = None
        self._next = 0

    @property
    def frame_ids(self) -> list[str]:
        """Six-digit frame numbers from 000000."""
        return [f'{index:06d}' for index in range(self._count)]

    def __len__(self) -> int:
        """Return the number of frames."""
        return self._count

    def __getitem__(self, index: int) -> Frame:
        """Read one frame; fast in rising order, otherwise the video is read from its start."""
        if not -self._count <= index < self._count:
            raise IndexError(f'frame {index} of {self._count}')
        index %= self._count
        if self._capture is None or index < self._next:
            self._capture = self._open()
            self._next = 0
        while self._next < index and self._capture.grab():
            self._next += 1
        self._next = index + 1
        return self._read(self._capture, index)

    def __iter__(self) -> Iterator[Frame]:
        """Decode the frames in order."""
        capture = self._open()
        for index in range(self._count):
            yield self._read(capture, index)
        capture.release()

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(str(self.root))
        if not capture.isOpened():
            raise UserError(f'{self.root}: OpenCV cannot open this video. The file is damaged or '
                            'its codec is unknown; convert it to H.264 in MP4.')
        # Pixels as stored: a rotated picture would not be what the camera driver delivers.
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)
        return capture

    def _read(self, capture: cv2.VideoCapture, index: int) -> Frame:
        good, image_bgr = capture.read()
        if not good:
            raise UserError(f'{self.root}: frame {index} of {self._count} cannot be decoded. '
                            'The file is damaged; convert it again.')
        stamp_ns = round(index * 1e9 / self.rate_hz) if self.rate_hz else None
        return Frame(f'{index:06d}', cv2.cvtColor(image_bgr, cv2.COLOR_BGR2RGB),
                     stamp_ns=stamp_ns)
