# SPDX-License-Identifier: Apache-2.0
"""Image-level detection of another domain, from result folders."""

import json
from pathlib import Path

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.image_level import image_level
from anomaly_seg_ros.metrics.calibration import IMAGE_STATISTICS
import pytest


def result_folder(folder: Path, values: list[float], sha256: str = 'a' * 64) -> Path:
    """Write what image_level reads of a run; all statistics of a frame get one value."""
    folder.mkdir()
    (folder / 'metrics.json').write_text(json.dumps(
        {'run': {'model_sha256': sha256, 'card': {'score': 'msp'}}}))
    columns = ['frame_id', *(f'score_{name}' for name in IMAGE_STATISTICS)]
    lines = [','.join(columns)]
    lines += [','.join([str(i), *[str(value)] * len(IMAGE_STATISTICS)])
              for i, value in enumerate(values)]
    (folder / 'per_frame.csv').write_text('\n'.join(lines) + '\n')
    return folder


def test_auroc_counts_pairs_with_ties_as_half(tmp_path: Path) -> None:
    """Of the six pairs three are ordered rightly and two are tied: (3 + 2 / 2) / 6."""
    result = image_level(result_folder(tmp_path / 'in', [0.1, 0.2, 0.4]),
                         result_folder(tmp_path / 'out', [0.2, 0.4]))
    assert result.auroc == dict.fromkeys(IMAGE_STATISTICS, pytest.approx(4 / 6, abs=1e-15))
    assert (result.in_domain_frames, result.out_of_domain_frames, result.score) == (3, 2, 'msp')


def test_runs_of_different_models_are_refused(tmp_path: Path) -> None:
    """Scores of two models cannot be compared image by image."""
    with pytest.raises(UserError, match='different models'):
        image_level(result_folder(tmp_path / 'in', [0.1]),
                    result_folder(tmp_path / 'out', [0.2], 'b' * 64))


@pytest.mark.parametrize('name, text, said', [
    ('metrics.json', None, 'cannot be read'), ('per_frame.csv', None, 'cannot be read'),
    ('metrics.json', '{', 'not JSON'), ('metrics.json', '[]', 'must hold a JSON object'),
    ('metrics.json', '{}', 'does not name the model'),
    ('metrics.json', '{"run": null}', 'does not name the model'),
    ('per_frame.csv', 'frame_id\n0\n', 'score_mean'),
    ('per_frame.csv', 'frame_id,score_mean\n0,\n', 'score_mean')])
def test_what_is_no_run_is_named(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    """Each file that is missing or of another kind is named with the remedy."""
    runs = [result_folder(tmp_path / each, [0.1]) for each in ('in', 'out')]
    victim = runs[1] / name
    if text is None:
        victim.unlink()
    else:
        victim.write_text(text)
    with pytest.raises(UserError, match=f'out/{name}: (.|\n)*{said}(.|\n)*anomaly-seg evaluate'):
        image_level(*runs)
