# SPDX-License-Identifier: Apache-2.0
"""Every backend that this machine can run gives PyTorch's numbers; the others say why not."""

from importlib import metadata
import logging
from pathlib import Path
import subprocess
import sys
from typing import Any

from anomaly_seg_ros import backends
from anomaly_seg_ros.backends import AUTO_ORDER, available_backends, BACKENDS, open_backend
from anomaly_seg_ros.backends.onnxruntime import installed_twice, open_session, session_options
from anomaly_seg_ros.backends.onnxruntime_gpu import placement
from anomaly_seg_ros.backends.openvino import _replace_image_pooling
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.export import export_model, ExportRequest
from anomaly_seg_ros.model_file import load_model_file, ModelFile, write_model_file
from anomaly_seg_ros.networks import NETWORKS
from anomaly_seg_ros.ports import input_port, output_ports
from anomaly_seg_ros.preprocess import Preprocessor
from cards import card, identity_graph, identity_model
import fake_cuda
import numpy as np
from onnx import helper
import pytest
import small_network
from small_network import frames, small_model, small_weights  # noqa: F401
import torch


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the small network known, for the torch backend to build."""
    monkeypatch.setitem(NETWORKS, 'small', small_network.load)


# Resident MiB: a session open, closed, another one open.
MEMORY = """
import resource
from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.heap import give_back_freed_memory
from anomaly_seg_ros.model_file import load_model_file
import numpy as np
def resident_mib():
    give_back_freed_memory()
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() / 2**20
model = load_model_file({path!r})
image = np.zeros((1, 3, *model.card.input_size_hw), np.float32)
other = open_backend(model, 'cpu', threads=1)
with open_backend(model, 'cpu', threads=1) as one:
    one.run(image)
    print(resident_mib())
print(resident_mib())
other.run(image)
print(resident_mib())
"""


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='needs /proc')
def test_working_memory_is_given_back_with_a_session(small_weights: Path,  # noqa: F811
                                                     tmp_path: Path) -> None:
    """Also while another is open, which takes its own when it runs."""
    path = tmp_path / 'large.onnx'
    export_model(ExportRequest('small', small_weights, input_size_hw=(1024, 2048)), path,
                 frames(1))
    result = subprocess.run([sys.executable, '-c', MEMORY.format(path=str(path))], check=True,
                            capture_output=True, text=True)
    one, none, other = (float(line) for line in result.stdout.split())
    # The output of the first convolution is one part of it.
    assert min(one, other) - none > 8 * 512 * 1024 * 4 / 2**20


@pytest.mark.parametrize('mib, made', [(60, True), (68, False)])
def test_large_constants_are_not_made_when_a_model_is_opened(mib: int, made: bool,
                                                             tmp_path: Path) -> None:
    """A graph may have one in each block; together they took 17 GB."""
    import onnx
    import onnxruntime
    shape = np.array([mib, 2**18], np.int64)
    graph = helper.make_graph(
        [helper.make_node('Expand', ['one', 'shape'], ['wide']),
         helper.make_node('Add', ['x', 'wide'], ['y'])], 'wide',
        [helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, (1, 1))],
        [helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, (mib, 2**18))],
        [onnx.numpy_helper.from_array(np.ones((1, 2**18), np.float32), 'one'),
         onnx.numpy_helper.from_array(shape, 'shape')])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    options = session_options(1)
    options.optimized_model_filepath = str(tmp_path / 'optimised.onnx')
    onnxruntime.InferenceSession(model.SerializeToString(), options,
                                 providers=['CPUExecutionProvider'])
    optimised = onnx.load(options.optimized_model_filepath)
    assert ('Expand' not in [node.op_type for node in optimised.graph.node]) == made


@pytest.mark.parametrize('name', sorted(BACKENDS))
def test_backend_equals_pytorch(name: str, small_model: Path, known: None) -> None:  # noqa: F811
    """Labels are equal, the score within float32 rounding, at every call of the same backend."""
    model = load_model_file(small_model)
    reason = available_backends(model)[name]
    if reason is not None:
        pytest.skip(f'{name}: {reason}')
    preprocess = Preprocessor(model.card)
    network = small_network.build()
    with open_backend(model, name, threads=1) as backend:
        assert backend.name == name
        for frame in (*frames(2), frames(1)[0]):
            image = preprocess(frame)
            with torch.inference_mode():
                logits = network(torch.from_numpy(image))
            answer = backend.run(image)
            assert answer.labels.dtype == np.uint8
            assert answer.anomaly.dtype == np.float32
            np.testing.assert_array_equal(answer.labels, logits[0].argmax(0).numpy())
            np.testing.assert_allclose(answer.anomaly, -logits[0].amax(0).numpy(), atol=1e-5)
        description = backend.describe()
        assert {'backend', 'version'} <= description.keys()
        assert all(isinstance(value, str) for value in description.values())


@pytest.mark.parametrize('name', ['cpu', 'openvino', 'torch'])
@pytest.mark.parametrize('bad', [
    np.zeros((1, 3, 32, 65), np.float32), np.zeros((1, 3, 32, 64), np.float64),
    np.zeros((3, 32, 64), np.float32), np.zeros((32, 64, 3), np.uint8)])
def test_a_wrong_input_is_refused(name: str, bad: np.ndarray, small_model: Path,  # noqa: F811
                                  known: None) -> None:
    """Before it reaches the library, with what was expected."""
    if BACKENDS[name].unavailable(load_model_file(small_model)):
        pytest.skip(f'{name} is not available')
    with open_backend(load_model_file(small_model), name) as backend, \
            pytest.raises(ValueError, match='takes image float32 1x3x32x64, got'):
        backend.run(bad)


@pytest.mark.parametrize('name', ['cpu', 'openvino'])
def test_a_strided_input_is_taken(name: str, tmp_path: Path) -> None:
    """A view that is not contiguous gives the same as its copy."""
    model = identity_model(tmp_path / 'm.onnx')
    if BACKENDS[name].unavailable(model):
        pytest.skip(f'{name} is not available')
    large = np.random.default_rng(0).standard_normal((1, 3, 48, 80)).astype(np.float32)
    with open_backend(model, name, threads=1) as backend:
        answer = backend.run(large[:, :, ::2, ::2])
        np.testing.assert_array_equal(answer.anomaly, -large[0, :, ::2, ::2].max(0))


def test_an_unknown_backend_lists_the_choices(tmp_path: Path) -> None:
    """With auto among them."""
    with pytest.raises(UserError, match=r"'gpu'; choose one of auto, cpu, cuda, .*torch"):
        open_backend(identity_model(tmp_path / 'm.onnx'), 'gpu')


@pytest.mark.parametrize('name', ['cuda', 'onnxruntime-tensorrt', 'tensorrt'])
def test_a_backend_without_its_device_says_what_is_missing(name: str, tmp_path: Path) -> None:
    """Asked for by name it is an error with a remedy, never another device in silence."""
    model = identity_model(tmp_path / 'm.onnx')
    reason = BACKENDS[name].unavailable(model)
    if reason is None:
        pytest.skip(f'{name} is available here')
    with pytest.raises(UserError, match='choose --backend cpu') as error:
        open_backend(model, name)
    assert reason in str(error.value)


def test_auto_takes_the_fastest_available_and_says_so(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first of AUTO_ORDER that can run, with the reasons against those before it."""
    model = identity_model(tmp_path / 'm.onnx')
    reasons = available_backends(model)
    expected = next(name for name in AUTO_ORDER if reasons[name] is None)
    with caplog.at_level(logging.INFO, 'anomaly_seg_ros.backends'), \
            open_backend(model, 'auto', threads=1) as backend:
        assert backend.name == expected
    assert f'backend auto: {expected}' in caplog.text
    for name in AUTO_ORDER[:AUTO_ORDER.index(expected)]:
        assert f'not {name}: {reasons[name]}' in caplog.text


def unpooling_model(path: Path) -> ModelFile:
    """Return a model with an operator that ONNX Runtime has and OpenVINO has not."""
    model = identity_graph()
    for node in model.graph.node:
        node.input[0] = 'logits' if node.input[0] == 'image' else node.input[0]
    half = {'kernel_shape': [2, 2], 'strides': [2, 2]}
    model.graph.node.insert(0, helper.make_node('MaxUnpool', ['small', 'i'], ['logits'], **half))
    model.graph.node.insert(0, helper.make_node('MaxPool', ['image'], ['small', 'i'], **half))
    write_model_file(path, model.SerializeToString(), card())
    return load_model_file(path)


def test_auto_goes_on_where_a_backend_fails_to_open(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning that says why; where none opens, the error has every reason."""
    pytest.importorskip('openvino')
    monkeypatch.setattr(backends, 'AUTO_ORDER', ('openvino', 'cpu'))
    with open_backend(unpooling_model(tmp_path / 'm.onnx'), 'auto', threads=1) as backend:
        assert backend.name == 'cpu'
    (record,) = [x for x in caplog.records if x.name == 'anomaly_seg_ros.backends']
    assert record.levelno == logging.WARNING
    assert 'auto: cpu (not openvino: ' in record.message and 'MaxUnpool' in record.message
    graph = identity_graph()
    graph.graph.node[-1].op_type = 'Teleport'
    write_model_file(tmp_path / 'm.onnx', graph.SerializeToString(), card())
    with pytest.raises(UserError, match=r'no backend can run it here: openvino: .*; cpu: .*'):
        open_backend(load_model_file(tmp_path / 'm.onnx'), 'auto')


def test_auto_without_any_backend_says_why(tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """All reasons are given."""
    monkeypatch.setattr(backends, 'AUTO_ORDER', ('cuda',))
    model = identity_model(tmp_path / 'm.onnx')
    if BACKENDS['cuda'].unavailable(model) is None:
        pytest.skip('there is a GPU')
    with pytest.raises(UserError, match=r'no backend can run it here: cuda: '):
        open_backend(model, 'auto')


def test_a_provider_that_leaves_nodes_to_the_cpu_is_an_error(tmp_path: Path) -> None:
    """Real onnxruntime, with a provider of the CPU wheel that can run none of these operators."""
    onnxruntime = pytest.importorskip('onnxruntime')
    if 'AzureExecutionProvider' not in onnxruntime.get_available_providers():
        pytest.skip('this onnxruntime has no second provider')
    model = identity_model(tmp_path / 'm.onnx')
    with pytest.raises(UserError, match='cannot run every operator of this graph'):
        open_session(model, session_options(1), [('AzureExecutionProvider', {})])


def test_a_provider_that_is_not_in_this_build_is_an_error(tmp_path: Path) -> None:
    """It names the ones there are and what to install."""
    onnxruntime = pytest.importorskip('onnxruntime')
    if 'CUDAExecutionProvider' in onnxruntime.get_available_providers():
        pytest.skip('this onnxruntime has CUDA')
    with pytest.raises(UserError, match=r'has no CUDAExecutionProvider, only .*onnxruntime-gpu'):
        open_session(identity_model(tmp_path / 'm.onnx'), session_options(1),
                     [('CUDAExecutionProvider', {})])


def test_two_onnxruntimes_in_one_folder_are_named(tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """By what pip has recorded, with the way out."""
    if installed_twice() or not [*metadata.distributions(name='onnxruntime')]:
        pytest.skip('they are not as usual here')
    folder = tmp_path / 'onnxruntime_gpu-1.31.1.dist-info'
    folder.mkdir()
    (folder / 'METADATA').write_text('Metadata-Version: 2.1\nName: onnxruntime-gpu\n'
                                     'Version: 1.31.1\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    model = identity_model(tmp_path / 'm.onnx')
    if BACKENDS['cuda'].unavailable(model) is None:
        pytest.skip('there is a GPU')
    with pytest.raises(UserError, match='"pip uninstall onnxruntime onnxruntime-gpu", then'):
        open_backend(model, 'cuda')
    with pytest.raises(UserError, match='"pip uninstall onnxruntime onnxruntime-gpu", then'):
        open_session(model, session_options(1), [('CUDAExecutionProvider', {})])


def test_a_gpu_backend_that_does_not_open_frees_its_memory(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason."""
    import onnxruntime
    if 'CUDAExecutionProvider' in onnxruntime.get_available_providers():
        pytest.skip('this onnxruntime has CUDA')
    cuda = fake_cuda.install(monkeypatch)
    for name in ('CUDAExecutionProvider', 'TensorrtExecutionProvider'):
        monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda name=name: [name])
        (tmp_path / name).write_text('not a folder')
        with pytest.raises(UserError):
            open_backend(identity_model(tmp_path / 'm.onnx'),
                         'cuda' if name.startswith('CUDA') else 'onnxruntime-tensorrt',
                         cache=tmp_path / name)
        assert cuda.calls['cudaMalloc'] and cuda.memory == {}
    model = identity_model(tmp_path / 'm.onnx', precision='int8',
                           parity={'int8': {'target': 'onnxruntime'}})
    with pytest.raises(UserError, match='made for onnxruntime'):
        open_backend(model, 'onnxruntime-tensorrt')
    assert cuda.memory == {}


def test_placement_counts_the_nodes_of_each_provider(tmp_path: Path) -> None:
    """As the session itself recorded it."""
    options = session_options(1)
    options.add_session_config_entry('session.record_ep_graph_assignment_info', '1')
    session = open_session(identity_model(tmp_path / 'm.onnx'), options,
                           [('CPUExecutionProvider', {})])
    counts = placement(session)
    if not counts:
        pytest.skip('this onnxruntime does not tell')
    assert list(counts) == ['CPUExecutionProvider']
    assert 3 <= counts['CPUExecutionProvider'] <= 4


def test_an_operator_that_no_backend_knows_is_an_error(tmp_path: Path) -> None:
    """A graph with a made-up operator: each backend names file and remedy."""
    graph = identity_graph()
    graph.graph.node[-1].op_type = 'Teleport'
    write_model_file(tmp_path / 'm.onnx', graph.SerializeToString(), card())
    model = load_model_file(tmp_path / 'm.onnx')
    for name in ('cpu', 'openvino'):
        if BACKENDS[name].unavailable(model) is None:
            with pytest.raises(UserError, match=r'm\.onnx.*Teleport'):
                open_backend(model, name)


def test_openvino_runs_float16(small_weights: Path, tmp_path: Path) -> None:  # noqa: F811
    """It folds the casts at the ends into inputs and outputs, which then have several names."""
    pytest.importorskip('openvino')
    path = tmp_path / 'half.onnx'
    export_model(ExportRequest('small', small_weights, 'max_logit', (32, 64), precision='fp16'),
                 path, frames())
    model = load_model_file(path)
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 64)).astype(np.float32)
    with open_backend(model, 'cpu') as one, open_backend(model, 'openvino') as other:
        expected, got = one.run(image), other.run(image)
        assert float(np.abs(got.anomaly - expected.anomaly).max()) < 2e-2


def test_openvino_takes_the_first_of_equal_logits(tmp_path: Path) -> None:
    """As ONNX says, though its own operator for it is replaced; also in bfloat16."""
    if BACKENDS['openvino'].unavailable(identity_model(tmp_path / 'm.onnx')):
        pytest.skip('openvino is not available')
    rng = np.random.default_rng(1)
    image = rng.integers(-2, 3, (1, 3, 24, 40)).astype(np.float32) * 1.001
    image[..., :8] *= 1e38
    for precision in ('f32', 'speed'):
        with open_backend(load_model_file(tmp_path / 'm.onnx'), 'openvino', threads=1,
                          precision=precision) as backend:
            graph = backend._request.get_compiled_model().get_runtime_model()
            kinds = [x.get_rt_info()['layerType'].value for x in graph.get_ops()]
            assert 'TopK' not in kinds
            assert kinds.count('Reduce') == 2  # the score's own maximum, and the rank
            labels = backend.run(image).labels
        np.testing.assert_array_equal(labels, image[0].argmax(0))


@pytest.mark.parametrize(('size_hw', 'pads', 'replaced'), [
    ((24, 40), [0, 0], True), ((23, 40), [0, 0], False), ((24, 40), [1, 1], False)])
def test_openvino_pools_the_image_itself_in_another_way(
        size_hw: tuple[int, int], pads: list[int], replaced: bool) -> None:
    """Where 2x2 pixels become one and nothing else; the pixels are the same."""
    openvino = pytest.importorskip('openvino')
    from openvino import opset13 as ops
    image = np.random.default_rng(2).standard_normal((1, 3, *size_hw)).astype(np.float32)
    answers = []
    for change in (lambda graph: None, _replace_image_pooling):
        parameter = ops.parameter(image.shape, np.float32, name='image')
        pooled = ops.max_pool(parameter, [2, 2], [1, 1], pads, pads, [2, 2], 'floor', 'explicit',
                              'i64', 0)
        graph = openvino.Model([ops.relu(pooled.output(0))], [parameter])
        change(graph)
        answers.append(openvino.compile_model(graph, 'CPU')(image)[0])
    assert ('MaxPool' not in {node.get_type_name() for node in graph.get_ops()}) == replaced
    np.testing.assert_array_equal(*answers)


def test_openvino_says_its_arithmetic(tmp_path: Path) -> None:
    """Float32 unless speed is asked for."""
    pytest.importorskip('openvino')
    model = identity_model(tmp_path / 'm.onnx')
    with open_backend(model, 'openvino') as backend:
        assert backend.describe()['arithmetic'] == 'f32'
    with open_backend(model, 'openvino', precision='speed') as backend:
        assert backend.describe()['arithmetic'] in ('f32', 'bf16', 'f16')
    with pytest.raises(ValueError, match='precision must be one of'):
        open_backend(model, 'openvino', precision='int4')
    with pytest.raises(UserError, match=r'cannot compile it for NPU9'):
        open_backend(model, 'openvino', device='NPU9')


@pytest.mark.parametrize(('device', 'chosen', 'said'), [
    ('GPU', ['GPU.0'], 'GPU.0'), ('GPU.1', ['GPU.1'], 'GPU.1'), ('NPU', 'NPU', 'NPU'),
    ('AUTO', ['CPU'], 'CPU'), ('GPU', ['CPU'], None), ('GPU.1', ['GPU.0'], None)])
def test_openvino_runs_on_the_device_asked_for(
        device: str, chosen: list[str] | str, said: str | None, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it names in several ways; another one is an error. Compiled for the CPU here."""
    openvino = pytest.importorskip('openvino')
    compile_model = openvino.Core.compile_model

    class Compiled:
        def __init__(self, core: Any, graph: Any, name: str, config: Any) -> None:
            self._compiled = compile_model(core, graph, 'CPU', config)

        def get_property(self, name: str) -> Any:
            return chosen if name == 'EXECUTION_DEVICES' else self._compiled.get_property(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._compiled, name)

    monkeypatch.setattr(openvino.Core, 'compile_model',
                        lambda *arguments: Compiled(*arguments))
    model = identity_model(tmp_path / 'm.onnx')
    if said is None:
        with pytest.raises(UserError, match=rf'asked for OpenVINO on {device}, it chose '):
            open_backend(model, 'openvino', device=device)
    else:
        with open_backend(model, 'openvino', device=device) as backend:
            assert backend.describe()['device'] == said


def test_torch_wants_the_very_weights(small_model: Path, known: None,  # noqa: F811
                                      tmp_path: Path) -> None:
    """Weights of another training are refused by their SHA-256; missing ones are named."""
    model = load_model_file(small_model)
    torch.save(small_network.build(2.0).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(UserError, match=r'other\.pth: not the weights of .*SHA-256'):
        open_backend(model, 'torch', weights=tmp_path / 'other.pth')
    (tmp_path / 'm.onnx').write_bytes(model.data)
    elsewhere = load_model_file(tmp_path / 'm.onnx')
    with pytest.raises(UserError, match=r'it needs the weights, which are not at .*small\.pth'):
        open_backend(elsewhere, 'torch')
    with open_backend(elsewhere, 'torch', weights=small_model.parent / 'small.pth') as backend:
        assert backend.describe()['backend'] == 'torch cpu'


def test_ports_are_what_the_card_promises() -> None:
    """Names, types and shapes of both variants."""
    assert str(input_port(card())) == 'image float32 1x3x24x40'
    device = card(input_variant='device', frame_size_hw=(48, 80), output_size_hw=(48, 80))
    assert str(input_port(device)) == 'image uint8 48x80x3'
    assert list(map(str, output_ports(device))) == ['labels uint8 1x48x80',
                                                    'anomaly float32 1x48x80']
