# SPDX-License-Identifier: Apache-2.0
"""
Tell images of an unknown domain from those of the known one, by one score an image.

de Jorge et al., "Reliability in Semantic Segmentation", CVPR 2023: a network evaluated on frames
of its own domain (Cityscapes) and of another (fog, another country), AUROC over images of the
mean confidence; here of the mean, maximum and quantiles of any score.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomaly_seg_ros.compare import read_run
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.metrics.calibration import image_level_auroc, IMAGE_STATISTICS

_REMEDY = 'Give a folder written by "anomaly-seg evaluate" or "anomaly-seg replay".'


@dataclass(frozen=True)
class ImageLevel:
    """
    Image-level detection of another domain.

    Attributes
    ----------
    score
        The anomaly score of the model.
    in_domain, out_of_domain
        The two result folders.
    in_domain_frames, out_of_domain_frames
        Their numbers of frames.
    auroc
        Statistic of the score map -> AUROC in [0, 1]; 0.5 tells nothing.

    """

    score: str
    in_domain: str
    out_of_domain: str
    in_domain_frames: int
    out_of_domain_frames: int
    auroc: dict[str, float | None]


def image_level(in_domain: Path | str, out_of_domain: Path | str) -> ImageLevel:
    """
    Compare the score maps of two runs of one model, image by image.

    Parameters
    ----------
    in_domain, out_of_domain
        Result folders of ``evaluate`` or ``replay``.

    Raises
    ------
    UserError
        If a folder is no such result, or the two come from different models.

    """
    runs = [_read(Path(folder)) for folder in (in_domain, out_of_domain)]
    (known, model, score), (unknown, other, _) = runs
    if model != other:
        raise UserError(f'{in_domain} and {out_of_domain} are runs of different models (sha256 '
                        f'{model[:12]} and {other[:12]}). Evaluate both with one model.')
    return ImageLevel(
        score, str(in_domain), str(out_of_domain), len(known['mean']), len(unknown['mean']),
        {name: image_level_auroc(known[name], unknown[name]) for name in IMAGE_STATISTICS})


def _read(folder: Path) -> tuple[dict[str, list[float]], str, str]:
    """Return the statistics of each frame, the model's sha256 and its score."""
    run = read_run(folder, str(folder))
    try:
        about: Any = run.metrics['run']
        model, score = str(about['model_sha256']), str(about['card']['score'])
    except (KeyError, TypeError) as error:
        raise UserError(f'{folder / "metrics.json"}: does not name the model of the run. '
                        f'{_REMEDY}') from error
    values = {name: [row.get(f'score_{name}') for row in run.rows.values()]
              for name in IMAGE_STATISTICS}
    known = {name: [value for value in column if value is not None]
             for name, column in values.items()}
    if known != values:
        raise UserError(f'{folder / "per_frame.csv"}: must hold a value for every frame in the '
                        f'columns score_{", score_".join(IMAGE_STATISTICS)}. {_REMEDY}')
    return known, model, score
