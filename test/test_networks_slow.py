# SPDX-License-Identifier: Apache-2.0
"""Every network family at its published size and 512x1024: export, parity, pipeline, node."""

from typing import Any

from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.export import export_model, ExportRequest
from anomaly_seg_ros.model_file import load_model_file
from anomaly_seg_ros.networks.erfnet import ERFNet
from anomaly_seg_ros.networks.variants import VARIANTS
from anomaly_seg_ros.pipeline import Pipeline
import cv2
import numpy as np
import pytest
import torch

transformers = pytest.importorskip('transformers', reason='needs pip install .[networks]')

from segmenters import family, save  # noqa: E402, I100

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZE = (512, 1024)

# Case -> configuration, score.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    'segformer': (VARIANTS['segformer_b0'][1], 'msp'),
    'upernet-convnext': (VARIANTS['upernet_convnext_tiny'][1], 'entropy'),
    'upernet-swin': (VARIANTS['upernet_swin_tiny'][1], 'energy'),
    'mask2former': (VARIANTS['mask2former_swin_tiny'][1], 'rba'),
    'eomt': ({**VARIANTS['eomt_small'][1], 'image_size': 512, 'num_queries': 100}, 'rba'),
    'dpt': ({'image_size': 384}, 'max_logit'),
    'beit': ({**VARIANTS['beit_base'][1], 'num_hidden_layers': 8, 'out_indices': [2, 4, 6, 8]},
             'msp'),
    'mobilenet_v2_deeplabv3plus': ({'output_stride': 8}, 'variance'),
}


def pictures(count=2, size_hw=(720, 1280)):
    """Make RGB images of soft blobs."""
    generator = np.random.default_rng(3)
    return [cv2.resize(generator.integers(0, 256, (12, 20, 3), dtype=np.uint8), size_hw[::-1],
                       interpolation=cv2.INTER_CUBIC) for _ in range(count)]


def check(network, weights, score, tmp_path):
    path = tmp_path / 'model.onnx'
    card = export_model(ExportRequest(network, weights, score, SIZE), path, frames=pictures())
    print(network, score, card.parity)
    # Of the score's range, as float32's rounding is: sums over 100 queries and 19 classes.
    assert card.parity['max_score_error'] <= 1e-4 * max(1, card.parity['score_range'])
    assert card.parity['label_mismatch'] <= 1e-4
    assert card.output_size_hw == SIZE
    frame = pictures()[0]
    with open_backend(load_model_file(path), 'cpu') as backend:
        pipeline = Pipeline(backend)
        detection = pipeline(frame).copy()
        assert detection.labels.shape == detection.anomaly.shape == (720, 1280)
        if network != 'mask2former':  # with random weights it names one class everywhere
            assert len(np.unique(detection.labels)) > 1
        assert detection.anomaly.std() > 0
        check_in_node(path, pipeline, frame)


def check_in_node(path, pipeline, frame):
    """Ask the live node the same, where there is a ROS."""
    try:
        import rclpy  # noqa: F401
    except ImportError:
        return
    from anomaly_seg_ros.ros.client import NodeRun
    from ros_helpers import Driver
    with NodeRun({'model': str(path)}, outputs=('labels', 'anomaly')) as run:
        Driver(run).check_answer(pipeline, frame, timeout_s=120)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize('case', CASES)
def test_transformers(case, tmp_path):
    settings, score = CASES[case]
    check(family(case), save(case, tmp_path / 'checkpoint', settings=settings), score, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize('score', ['msp', 'void', 'mutual_information'])
def test_erfnet(score, tmp_path):
    torch.manual_seed(1)
    torch.save(ERFNet(20).state_dict(), tmp_path / 'erfnet.pth')
    check('erfnet', tmp_path / 'erfnet.pth', score, tmp_path)
