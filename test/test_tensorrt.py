# SPDX-License-Identifier: Apache-2.0
"""Engines and their runner, on a stand-in with TensorRT's names where there is no GPU."""

from collections.abc import Iterator
from dataclasses import replace
import json
from pathlib import Path
from typing import Any

from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.backends.tensorrt import EngineRunner, TensorrtBackend
from anomaly_seg_ros.cli import cli
from anomaly_seg_ros.cuda import Gpu
from anomaly_seg_ros.engine import (
    build_engine, check_engine, engine_path, EngineSettings, layer_precisions, load_engine,
    record_path, tensorrt_graph)
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import load_model_file, ModelFile, write_model_file
from anomaly_seg_ros.pipeline import Pipeline
from anomaly_seg_ros.preprocess import Preprocessor
from cards import card, identity_graph, identity_model
from click.testing import CliRunner
import fake_cuda
from fake_tensorrt import install, State
import numpy as np
import onnx
from onnx import helper, numpy_helper, TensorProto
import pytest


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    """Yield a pretended TensorRT on a pretended GPU; all its memory must be given back."""
    cuda = fake_cuda.install(monkeypatch)
    yield install(monkeypatch, cuda)
    assert cuda.memory == {}


@pytest.fixture
def model(tmp_path: Path) -> ModelFile:
    """Return a float32 model file of 24x40."""
    return identity_model(tmp_path / 'm.onnx')


def half_model(path: Path) -> ModelFile:
    """Return a model whose card says fp16 and whose graph holds a float16 constant."""
    graph = identity_graph()
    graph.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float16), 'unused'))
    write_model_file(path, graph.SerializeToString(), card(precision='fp16'))
    return load_model_file(path)


def noise(seed: int = 0, size_hw: tuple[int, int] = (24, 40)) -> np.ndarray:
    """Return a random input."""
    return np.random.default_rng(seed).standard_normal((1, 3, *size_hw)).astype(np.float32)


def test_build_and_run(fake: State, model: ModelFile) -> None:
    """The engine built from a model file answers as the model does; its record tells its key."""
    steps: list[tuple[str, int, int]] = []
    engine = build_engine(model, engine_path(model), progress=lambda *x: steps.append(x))
    assert steps == [('Building Engine', 0, 2), ('Building Engine', 1, 2),
                     ('Building Engine', 2, 2), ('Building Engine', 2, 2)]
    assert load_engine(engine.path) == engine
    assert engine.key.model_sha256 == model.sha256
    assert (engine.key.gpu, engine.key.compute_capability) == ('Fake GPU', '8.7')
    assert engine.card == model.card
    assert engine.layer_precisions == {'fp32': 1}
    assert fake.seen['flags'] == 2
    assert fake.seen['cleared'].name == 'TF32'
    with open_backend(model, 'tensorrt') as backend:
        for seed in range(3):
            answer = backend.run(noise(seed))
            np.testing.assert_array_equal(answer.anomaly, -noise(seed)[0].max(0))
            np.testing.assert_array_equal(answer.labels, noise(seed)[0].argmax(0))
        assert backend.describe()['arithmetic'] == '1 layers fp32'
        assert backend.describe()['device'] == 'Fake GPU'


def test_the_device_is_chosen_before_anything_is_done_on_it(fake: State,
                                                            model: ModelFile) -> None:
    """Built, loaded and run on the GPU asked for; one that is not there is named."""
    fake.cuda.devices = 2
    build_engine(model, engine_path(model), EngineSettings(device=1))
    assert fake.seen['built on'] == fake.seen['loaded on'] == 1
    fake.cuda.device = fake.seen['loaded on'] = 0
    with open_backend(model, 'tensorrt', device=1):
        assert fake.seen['loaded on'] == fake.cuda.device == 1
    for ask in (lambda: open_backend(model, 'tensorrt', device=2),
                lambda: build_engine(model, engine_path(model), EngineSettings(device=2))):
        with pytest.raises(UserError, match='no CUDA device 2: this machine has 2'):
            ask()


def test_frames_reuse_buffers_and_graph(fake: State, model: ModelFile) -> None:
    """One warm-up and one capture, then only replays; the pinned input saves a copy."""
    build_engine(model, engine_path(model))
    with open_backend(model, 'tensorrt') as backend:
        assert fake.seen['executed'] == 2
        allocated = fake.cuda.calls['cudaMalloc']
        for seed in range(5):
            backend.run(noise(seed))
        assert backend.input_buffer is not None
        backend.input_buffer[:] = noise(9)
        answer = backend.run(backend.input_buffer)
        np.testing.assert_array_equal(answer.anomaly, -noise(9)[0].max(0))
        assert fake.cuda.calls['cudaMalloc'] == allocated == 3
        assert fake.cuda.calls['capture'] == 1
        assert fake.cuda.calls['cudaGraphLaunch'] == 6
        assert fake.seen['executed'] == 2
    assert fake.cuda.calls['cudaStreamDestroy'] == 1


def test_the_pipeline_writes_into_pinned_memory(fake: State, model: ModelFile) -> None:
    """Preprocessing goes straight into the backend's buffer; detections are those of the CPU."""
    build_engine(model, engine_path(model))
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 80, 3), dtype=np.uint8)
    with open_backend(model, 'tensorrt') as backend, open_backend(model, 'cpu') as cpu:
        pipeline, reference = Pipeline(backend), Pipeline(cpu)
        for frame in frames:
            detection, expected = pipeline(frame), reference(frame)
            np.testing.assert_array_equal(detection.anomaly, expected.anomaly)
            np.testing.assert_array_equal(detection.labels, expected.labels)
            np.testing.assert_array_equal(backend.input_buffer[0].transpose(1, 2, 0),
                                          Preprocessor(model.card)(frame)[0].transpose(1, 2, 0))


def test_without_a_graph_every_frame_is_enqueued(fake: State, model: ModelFile) -> None:
    """The option turns the capture off; answers are the same."""
    build_engine(model, engine_path(model))
    with open_backend(model, 'tensorrt', cuda_graph=False) as backend:
        answer = backend.run(noise(4))
        np.testing.assert_array_equal(answer.anomaly, -noise(4)[0].max(0))
    assert fake.cuda.calls['capture'] == 0
    assert fake.seen['executed'] == 2


def test_an_engine_has_one_shape(fake: State, model: ModelFile) -> None:
    """It is captured once, and another shape is refused."""
    engine = build_engine(model, engine_path(model))
    runner = EngineRunner(engine.data, engine.path)
    with pytest.raises(UserError, match=r'inputs \(1, 3, 24, 40\), got \(1, 3, 32, 64\)'):
        runner.prepare((1, 3, 32, 64))
    for seed in range(3):
        np.testing.assert_array_equal(runner.run(noise(seed))['anomaly'], -noise(seed).max(1))
    assert fake.cuda.calls['capture'] == 1
    runner.close()


def test_settings_reach_the_builder(fake: State, model: ModelFile, tmp_path: Path) -> None:
    """Workspace, compatibility, optimisation level, timing cache."""
    settings = EngineSettings(workspace_mib=64, hardware_compatibility='ampere+',
                              optimization_level=5, timing_cache=tmp_path / 'timing.cache')
    engine = build_engine(model, engine_path(model), settings)
    assert fake.seen['workspace'] == 64 << 20
    config = fake.seen['config']
    assert config.hardware_compatibility_level.name == 'AMPERE_PLUS'
    assert config.builder_optimization_level == 5
    assert config.profiling_verbosity.name == 'DETAILED'
    assert fake.seen['timing_cache'] is True
    assert (tmp_path / 'timing.cache').read_bytes() == b'timing cache, longer'
    assert engine.key.hardware_compatibility == 'ampere+'
    for bad in ({'workspace_mib': 0}, {'hardware_compatibility': 'all'},
                {'optimization_level': 6}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            EngineSettings(**bad)


@pytest.mark.parametrize(('here', 'message'), [
    (('11.4.0.106', 'Fake GPU', '8.7'), 'tensorrt is 11.4.0.106, it was built for 10.16.1.11'),
    (('10.16.1.11', 'Orin', '8.7'), 'gpu is Orin, it was built for Fake GPU'),
    (('10.16.1.11', 'Fake GPU', '9.0'), 'compute_capability is 9.0, it was built for 8.7')])
def test_a_foreign_engine_is_refused(fake: State, model: ModelFile, here: tuple[str, str, str],
                                     message: str) -> None:
    """With the command that rebuilds it."""
    engine = build_engine(model, engine_path(model))
    check_engine(engine, model, '10.16.1.11', Gpu('Fake GPU', '8.7', 0))
    with pytest.raises(UserError, match=message) as error:
        check_engine(engine, model, here[0], Gpu(here[1], here[2], 0))
    assert f'"anomaly-seg build-engine {model.path} --output {engine.path}"' in str(error.value)


def test_hardware_compatibility_widens_what_fits(fake: State, model: ModelFile) -> None:
    """Each level lets in what it was built for, and no more."""
    def fits(level: str, name: str, capability: str) -> bool:
        engine = build_engine(model, engine_path(model),
                              EngineSettings(hardware_compatibility=level))
        try:
            check_engine(engine, model, '10.16.1.11', Gpu(name, capability, 0))
        except UserError:
            return False
        return True
    assert fits('ampere+', 'Other', '9.0')
    assert fits('ampere+', 'Other', '8.0')
    assert not fits('ampere+', 'Other', '7.5')
    assert fits('same-compute-capability', 'Other', '8.7')
    assert not fits('same-compute-capability', 'Fake GPU', '9.0')


def test_an_engine_of_another_model_is_refused_or_rebuilt(
        fake: State, model: ModelFile, caplog: pytest.LogCaptureFixture) -> None:
    """A stale engine never runs; with ``build`` it is built again, and the log says so."""
    path = engine_path(model)
    build_engine(model, path)
    write_model_file(model.path, identity_graph().SerializeToString(), card(threshold=-0.4))
    newer = load_model_file(model.path)
    assert 'model_sha256' in (TensorrtBackend.unavailable(newer) or '')
    with pytest.raises(UserError, match=r'stale.*model_sha256'):
        open_backend(newer, 'tensorrt')
    with open_backend(newer, 'tensorrt', build=True) as backend:
        backend.run(noise())
    assert 'building' in caplog.text
    assert 'takes minutes' in caplog.text
    assert load_engine(path).key.model_sha256 == newer.sha256


def test_a_missing_engine_names_the_command(fake: State, model: ModelFile) -> None:
    """Both files are looked for."""
    with pytest.raises(UserError, match=r'm\.engine and m\.engine\.json.*"anomaly-seg build-'):
        open_backend(model, 'tensorrt')
    build_engine(model, engine_path(model))
    record_path(engine_path(model)).unlink()
    with pytest.raises(UserError, match='cannot be read'):
        open_backend(model, 'tensorrt')


@pytest.mark.parametrize('damage', ['plan', 'truncated', 'record', 'key', 'card', 'other'])
def test_damaged_engines_are_refused(damage: str, fake: State, model: ModelFile) -> None:
    """A changed byte in the plan, and whatever may happen to the record."""
    path = engine_path(model)
    build_engine(model, path)
    record = record_path(path)
    if damage == 'plan':
        path.write_bytes(path.read_bytes().replace(b'conv', b'vonc'))
    elif damage == 'truncated':
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == 'record':
        record.write_text(record.read_text()[:40])
    else:
        values: Any = json.loads(record.read_text())
        if damage == 'other':
            values = [values]
        elif damage == 'key':
            del values['key']['gpu']
        else:
            values['card']['std'] = [0, 0, 0]
        record.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r'm\.engine.*damaged.*Build it with'):
        load_engine(path)


def test_a_claimed_float16_that_is_not_is_an_error(fake: State, tmp_path: Path) -> None:
    """The layers' own precisions decide, not the card and not a flag."""
    model = half_model(tmp_path / 'm.onnx')
    path = engine_path(model)
    fake.layer_format = 'Row major linear FP32'
    with pytest.raises(UserError, match=r"card says fp16, but .* compute in \{'fp32': 1\}"):
        build_engine(model, path)
    assert not path.exists()
    assert not record_path(path).exists()
    fake.layer_format = None
    assert build_engine(model, path).layer_precisions == {'fp16': 1}


def test_products_that_the_graph_has_in_float32_may_stay_so(fake: State, tmp_path: Path) -> None:
    """The score of masks is a product of matrices in float32; one more than there are is not."""
    graph = identity_graph()
    score = graph.graph.node[-1]
    score.input[0] = 'mixed'
    graph.graph.node.insert(3, helper.make_node('MatMul', ['largest', 'mix'], ['mixed']))
    graph.graph.initializer.extend([
        numpy_helper.from_array(np.eye(40, dtype=np.float32), 'mix'),
        numpy_helper.from_array(np.ones(1, np.float16), 'unused')])
    write_model_file(tmp_path / 'm.onnx', graph.SerializeToString(), card(precision='fp16'))
    model = load_model_file(tmp_path / 'm.onnx')
    product = {'LayerType': 'gemm', 'Inputs': [{'Format/Datatype': 'Row major linear FP32'}]}
    fake.more_layers = (product,)
    assert build_engine(model, engine_path(model)).layer_precisions == {'fp16': 1, 'fp32': 1}
    fake.more_layers = (product, product)
    with pytest.raises(UserError, match='card says fp16, but'):
        build_engine(model, engine_path(model))


def test_layer_precisions_are_read_from_either_wording() -> None:
    """Formats have been named in several ways; only layers that multiply count."""
    def layer(kind: str, *formats: str) -> dict[str, Any]:
        return {'Name': 'x', 'LayerType': kind,
                'Inputs': [{'Format/Datatype': text} for text in formats]}
    layers = [layer('CaskConvolution', 'Channel major FP16 format where channel % 8 == 0'),
              layer('CaskDeconvolutionV2', 'Half'), layer('gemm', 'Row major linear FP32'),
              layer('CaskConvolution', 'Thirty-two wide channel vectorized row major Int8 format',
                    'Float'), layer('Reformat', 'Half'), layer('conv', 'BFloat16')]
    assert layer_precisions(json.dumps({'Layers': layers})) == {
        'fp16': 2, 'fp32': 1, 'int8': 1, 'bf16': 1}
    with pytest.raises(UserError, match='only the names'):
        layer_precisions(json.dumps({'Layers': ['conv_1']}))


@pytest.mark.parametrize(('attribute', 'text', 'message'), [
    ('build_error', 'Error Code 2: OutOfMemory (Requested size was 9 bytes.)',
     r'Memory ran out \(workspace: 64 MiB\).*--workspace'),
    ('build_error', 'Error Code 10: Internal', 'Error Code 10: Internal. Export it again'),
    ('load_error', 'Error Code 1: Serialization', 'cannot load: Error Code 1'),
    ('refuse_graph', 'In node 3 (parse): UNSUPPORTED_NODE: Teleport',
     'cannot take this graph: In node 3.*Teleport.*--backend cuda')])
def test_a_build_that_fails_leaves_no_file(attribute: str, text: str, message: str, fake: State,
                                           model: ModelFile) -> None:
    """None comes back, and a log line; the error gives its reason and a remedy."""
    setattr(fake, attribute, text)
    with pytest.raises(UserError, match=message):
        build_engine(model, engine_path(model), EngineSettings(workspace_mib=64))
    assert sorted(x.name for x in model.path.parent.iterdir()) == ['m.onnx']


def test_a_damaged_timing_cache_is_an_error(fake: State, model: ModelFile, tmp_path: Path) -> None:
    """It is named, and left as it is."""
    cache = tmp_path / 'timing.cache'
    cache.write_bytes(b'garbage')
    with pytest.raises(UserError, match=r'timing\.cache: damaged.*Delete it'):
        build_engine(model, engine_path(model), EngineSettings(timing_cache=cache))
    assert cache.read_bytes() == b'garbage'
    assert not engine_path(model).exists()


def test_a_timing_cache_that_cannot_be_used_costs_no_engine(fake: State, model: ModelFile,
                                                            tmp_path: Path) -> None:
    """One that cannot be read ends before the build, one that cannot be written after it."""
    with pytest.raises(UserError, match='timing cache cannot be read'):
        build_engine(model, engine_path(model), EngineSettings(timing_cache=tmp_path))
    assert not engine_path(model).exists()

    def written_meanwhile(what: str, done: int, total: int) -> None:
        (tmp_path / 'folder').write_text('a file')
    with pytest.raises(UserError, match=r'timing\.cache: cannot be written'):
        build_engine(model, engine_path(model),
                     EngineSettings(timing_cache=tmp_path / 'folder' / 'timing.cache'),
                     written_meanwhile)
    assert load_engine(engine_path(model)).card == model.card


def test_an_engine_is_not_built_from_an_engine(fake: State, model: ModelFile) -> None:
    """Nor written under the name of a model; a stale one asks for the .onnx."""
    result = CliRunner().invoke(cli, ['build-engine', str(model.path), '--device', '0'])
    assert result.exit_code == 0, result.output
    engine = load_model_file(engine_path(model))
    with pytest.raises(UserError, match=r'm\.engine: this is an engine already'):
        build_engine(engine, model.path.with_name('n.engine'))
    for name in ('m.onnx', 'm.plan'):
        with pytest.raises(UserError, match=r'must end in \.engine, such as m\.engine'):
            build_engine(model, model.path.with_name(name))
    assert load_model_file(model.path).sha256 == model.sha256
    fake.cuda.gpu.name = b'Other GPU'
    with pytest.raises(UserError, match=r'stale.*build-engine .*m\.onnx'):
        open_backend(engine, 'tensorrt', build=True)


def test_errors_at_run_time(fake: State, model: ModelFile) -> None:
    """No memory for a context or for buffers, and a run that fails: each one clear error."""
    build_engine(model, engine_path(model))
    fake.no_context = True
    with pytest.raises(UserError, match='no memory to run this engine'):
        open_backend(model, 'tensorrt')
    fake.no_context = False
    fake.cuda.capacity = 24 * 40 * 3 * 4 * 2 + 100
    with pytest.raises(UserError, match=r'cudaErrorMemoryAllocation: out of memory.*Free GPU'):
        open_backend(model, 'tensorrt')
    fake.cuda.capacity = 1 << 40
    fake.seen['run_error'] = True
    with pytest.raises(UserError, match='TensorRT could not run'):
        open_backend(model, 'tensorrt')


def test_an_engine_whose_ports_are_not_the_cards_is_refused(fake: State, tmp_path: Path) -> None:
    """Should record and plan ever disagree, the plan's own ports are compared too."""
    model = identity_model(tmp_path / 'm.onnx')
    engine = build_engine(model, engine_path(model))
    other = replace(model, card=card(input_size_hw=(24, 48), output_size_hw=(24, 48)))
    runner = EngineRunner(engine.data, engine.path)
    from anomaly_seg_ros.ports import check_ports
    with pytest.raises(UserError, match='card and graph disagree'):
        check_ports(other, runner.inputs, runner.outputs)
    runner.close()


@pytest.mark.parametrize('attributes', [{}, {'saturate': 1}])
def test_tensorrt_graph_has_uint8_only_at_its_ends(attributes: dict[str, int]) -> None:
    """The rewritten graph gives the same answers, and casts to uint8 only from float."""
    from onnx.reference import ReferenceEvaluator

    graph = identity_graph()
    # As in a device graph: labels are used further inside, after their cast to uint8.
    graph.graph.node[1].CopyFrom(helper.make_node('Cast', ['index'], ['small'],
                                                  to=TensorProto.UINT8, **attributes))
    graph.graph.node.append(helper.make_node('Gather', ['small', 'rows'], ['labels'], axis=1))
    rows = np.repeat(np.arange(24), 2)[:24]
    graph.graph.initializer.append(numpy_helper.from_array(rows, 'rows'))
    data = graph.SerializeToString()
    rewritten = onnx.load_from_string(tensorrt_graph(data))
    onnx.checker.check_model(rewritten, full_check=True)
    expected = ReferenceEvaluator(onnx.load_from_string(data)).run(None, {'image': noise()})
    got = ReferenceEvaluator(rewritten).run(None, {'image': noise()})
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    types = {x.name: x.type.tensor_type.elem_type
             for x in onnx.shape_inference.infer_shapes(rewritten).graph.value_info}
    assert TensorProto.UINT8 not in types.values()
    for node in rewritten.graph.node:
        if node.op_type == 'Cast' and node.attribute[0].i == TensorProto.UINT8:
            assert types[node.input[0]] == TensorProto.FLOAT


def test_an_engine_is_a_model_file_too(fake: State, model: ModelFile) -> None:
    """It opens by itself, with its card, on its own backend and on no other."""
    engine = build_engine(model, engine_path(model))
    model.path.unlink()
    alone = load_model_file(engine.path)
    assert (alone.card, alone.sha256) == (model.card, model.sha256)
    for name in ('tensorrt', 'auto'):
        with open_backend(alone, name) as backend:
            np.testing.assert_array_equal(backend.run(noise()).anomaly, -noise()[0].max(0))
    with pytest.raises(UserError, match='runs on the backend tensorrt only, not on cpu'):
        open_backend(alone, 'cpu')


def test_without_tensorrt_building_says_what_to_install(model: ModelFile) -> None:
    """On this machine, unless it has both."""
    from anomaly_seg_ros.engine import missing_tensorrt
    reason = missing_tensorrt()
    if reason is None:
        pytest.skip('TensorRT and a GPU are here')
    with pytest.raises(UserError, match='extra "tensorrt"') as error:
        build_engine(model, engine_path(model))
    assert reason in str(error.value)
