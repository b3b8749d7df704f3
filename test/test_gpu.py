# SPDX-License-Identifier: Apache-2.0
"""
What runs on an NVIDIA GPU, against the same on the CPU; skipped where there is none.

Elsewhere the same code is tried on stand-ins for CUDA and TensorRT.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
import threading
from typing import Any

from anomaly_seg_ros.backends import Backend, BACKENDS, open_backend
from anomaly_seg_ros.cuda import CudaBuffers, missing_cuda
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.export import export_model, ExportRequest
from anomaly_seg_ros.model_file import load_model_file, ModelFile
from anomaly_seg_ros.pipeline import Pipeline
from anomaly_seg_ros.ports import Port
from anomaly_seg_ros.resources import resource
import numpy as np
import pytest
from small_network import frames, load, small_model  # noqa: F401

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(missing_cuda() is not None, reason=str(missing_cuda()))]

# Largest difference of the score from the CPU's, as a part of its range there. float32 sums in
# another order; float16 keeps 11 bits.
LIMITS = {'fp32': 1e-5, 'fp16': 2e-2}


@pytest.fixture(params=['cuda', 'torch'])
def backend(request: pytest.FixtureRequest, model: ModelFile) -> str:
    """Return a backend that can run the small model on the GPU."""
    name = str(request.param)
    reason = BACKENDS[name].unavailable(model)
    if name == 'torch':
        torch = pytest.importorskip('torch')
        reason = reason or (None if torch.cuda.is_available() else 'this torch has no CUDA')
    if reason is not None:
        pytest.skip(f'{name}: {reason}')
    return name


@pytest.fixture
def model(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFile:  # noqa: F811
    """Return the small network's model; torch can build it again."""
    from anomaly_seg_ros.networks import NETWORKS
    monkeypatch.setitem(NETWORKS, 'small', load)
    return load_model_file(small_model)


def open_gpu(name: str, model: ModelFile, **options: Any) -> Backend:
    """Open a backend on the GPU."""
    return open_backend(model, name, **({'device': 'cuda'} if name == 'torch' else {}), **options)


def inputs(model: ModelFile, count: int) -> Iterator[np.ndarray]:
    """Return random inputs of a host model."""
    rng = np.random.default_rng(0)
    height, width = model.card.input_size_hw
    for _ in range(count):
        yield rng.normal(size=(1, 3, height, width)).astype(np.float32)


def test_buffers_carry_bytes_there_and_back_and_a_graph_replays_them() -> None:
    port = Port('image', 'uint8', (1, 7, 5))
    buffers = CudaBuffers([port])
    rng = np.random.default_rng(0)

    def both_ways() -> None:
        buffers.upload('image')
        buffers.download('image')

    def check(work: Any) -> None:
        sent = rng.integers(0, 256, port.shape, np.uint8)
        buffers.host['image'][:] = sent
        buffers.upload('image')
        buffers.synchronize()
        buffers.host['image'][:] = 0
        work()
        buffers.synchronize()
        np.testing.assert_array_equal(buffers.host['image'], sent)

    check(lambda: buffers.download('image'))
    buffers.capture(lambda: buffers.download('image'))
    for _ in range(3):
        check(buffers.replay)
    buffers.close()
    buffers.close()
    with pytest.raises(UserError, match='there is no CUDA device 77'):
        CudaBuffers([port], 77)


@pytest.mark.parametrize('cuda_graph', [True, False])
def test_answers_equal_those_of_the_cpu(backend: str, model: ModelFile, cuda_graph: bool) -> None:
    """Each of many: a captured graph must read every input anew."""
    with open_backend(model, 'cpu') as reference, \
            open_gpu(backend, model, cuda_graph=cuda_graph) as device:
        for index, one in enumerate(inputs(model, 20)):
            expected = reference.run(one)
            if index % 2 and device.input_buffer is not None:
                device.input_buffer[:] = one
                one = device.input_buffer
            got = device.run(one)
            span = np.ptp(expected.anomaly)
            assert np.abs(got.anomaly - expected.anomaly).max() <= LIMITS['fp32'] * span
            assert (got.labels == expected.labels).mean() > 0.999


@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
@pytest.mark.parametrize('variant', ['host', 'device'])
def test_whole_frames_equal_those_of_the_cpu(backend: str, tmp_path: Path, precision: str,
                                             variant: str, model: ModelFile) -> None:
    size = {'frame_size_hw': (45, 76)} if variant == 'device' else {}
    request = ExportRequest('small', model.path.parent / 'small.pth', input_size_hw=(32, 64),
                            precision=precision, input_variant=variant, **size)
    export_model(request, tmp_path / 'small.onnx', frames())
    (tmp_path / 'small.pth').write_bytes((model.path.parent / 'small.pth').read_bytes())
    made = load_model_file(tmp_path / 'small.onnx')
    with open_backend(made, 'cpu') as reference, open_gpu(backend, made) as device:
        for frame in frames(6):
            expected, got = Pipeline(reference)(frame), Pipeline(device)(frame)
            span = np.ptp(expected.anomaly)
            assert np.abs(got.anomaly - expected.anomaly).max() <= LIMITS[precision] * span
            assert (got.labels == expected.labels).mean() > 0.98


def test_opened_on_one_thread_and_run_on_another(backend: str, model: ModelFile) -> None:
    """As the node does: a loader opens and warms up, the worker runs, two models at a time."""
    opened: list[Backend] = []

    def load_and_warm_up() -> None:
        opened.append(open_gpu(backend, model))
        Pipeline(opened[-1]).warm_up()

    for _ in range(2):
        loader = threading.Thread(target=load_and_warm_up)
        loader.start()
        loader.join()
    one = next(inputs(model, 1))
    with open_backend(model, 'cpu') as reference:
        expected = reference.run(one).anomaly.copy()
    first, second = opened
    for device in (first, second, first):
        np.testing.assert_allclose(device.run(one).anomaly, expected, atol=1e-5 * np.ptp(expected))
    first.close()
    np.testing.assert_allclose(second.run(one).anomaly, expected, atol=1e-5 * np.ptp(expected))
    second.close()


def test_memory_does_not_grow_with_openings(backend: str, model: ModelFile) -> None:
    from cuda.bindings import runtime

    def open_and_run() -> int:
        with open_gpu(backend, model) as device:
            device.run(next(inputs(model, 1)))
        return int(runtime.cudaMemGetInfo()[1])

    free = [open_and_run() for _ in range(12)]
    assert free[2] - free[-1] < 64 << 20


def test_the_bundled_model_on_the_gpu() -> None:
    model = load_model_file(resource('models/demo.onnx'))
    reason = BACKENDS['cuda'].unavailable(model)
    if reason is not None:
        pytest.skip(reason)
    rng = np.random.default_rng(0)
    with open_backend(model, 'cpu') as reference, open_backend(model, 'cuda') as device:
        assert 'CUDAExecutionProvider' in device.describe()['provider']
        for frame in rng.integers(0, 256, (3, 720, 1280, 3), np.uint8):
            expected, got = Pipeline(reference)(frame), Pipeline(device)(frame)
            span = np.ptp(expected.anomaly)
            assert np.abs(got.anomaly - expected.anomaly).max() <= 1e-4 * span
            assert (got.labels == expected.labels).mean() > 0.999


def test_a_second_gpu_that_is_not_there_is_refused(model: ModelFile) -> None:
    reason = BACKENDS['cuda'].unavailable(model)
    if reason is not None:
        pytest.skip(reason)
    with pytest.raises(UserError, match='there is no CUDA device 77'):
        open_backend(replace(model), 'cuda', device=77)


def test_a_network_that_cannot_be_captured_runs_without(model: ModelFile, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    """A tensor made from a list while it runs, as some of transformers' networks do."""
    torch = pytest.importorskip('torch')
    if not torch.cuda.is_available():
        pytest.skip('this torch has no CUDA')
    from anomaly_seg_ros.networks import NETWORKS

    class MakesTensors(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, image: Any) -> Any:
            return self.inner(image) * torch.tensor([1.0], device=image.device)

    def load_wrapped(*arguments: Any) -> Any:
        loaded = load(*arguments)
        return replace(loaded, module=MakesTensors(loaded.module).eval())

    monkeypatch.setitem(NETWORKS, 'small', load_wrapped)
    with open_backend(model, 'cpu') as reference, open_gpu('torch', model) as device:
        assert device.describe()['cuda_graph'] == 'False' and 'not captured' in caplog.text
        for one in inputs(model, 3):
            expected = reference.run(one).anomaly
            np.testing.assert_allclose(device.run(one).anomaly, expected,
                                       atol=1e-5 * np.ptp(expected))


NETWORKS_TRIED = ('segformer', 'upernet-convnext', 'upernet-swin', 'mask2former', 'eomt', 'dpt',
                  'beit', 'mobilenet_v2_deeplabv3plus')


@pytest.mark.parametrize('case', NETWORKS_TRIED)
def test_every_network_and_score_runs_on_cuda_alone(case: str, tmp_path: Path) -> None:
    """All scores of one network of each kind, the usual one of the others; none on the CPU."""
    pytest.importorskip('transformers')
    from anomaly_seg_ros.fused import applicable_scores
    from anomaly_seg_ros.networks import load_network
    from segmenters import family, save
    reason = BACKENDS['cuda'].unavailable(load_model_file(resource('models/demo.onnx')))
    if reason is not None:
        pytest.skip(reason)
    folder, size = save(case, tmp_path / case), (64, 96)
    scores = applicable_scores(load_network(family(case), folder, size))
    for score in scores if case in ('segformer', 'mask2former') else scores[:1]:
        path = tmp_path / f'{score}.onnx'
        export_model(ExportRequest(family(case), folder, score, size), path, frames(1, (90, 130)))
        made = load_model_file(path)
        with open_backend(made, 'cpu') as reference, open_backend(made, 'cuda') as device:
            for frame in frames(3, (90, 130)):
                expected, got = Pipeline(reference)(frame), Pipeline(device)(frame)
                error = np.abs(got.anomaly - expected.anomaly).max() / np.ptp(expected.anomaly)
                assert error <= 1e-3, (score, error)
                assert (got.labels == expected.labels).mean() > 0.99, score
