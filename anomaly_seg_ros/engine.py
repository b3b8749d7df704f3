# SPDX-License-Identifier: Apache-2.0
"""
TensorRT engines: build one from a model file, know whether it belongs here.

An engine is good for one model, one TensorRT and one kind of GPU, and a plan file has no place to
say so. So a JSON file lies beside it (``model.engine.json``) with that key, the model's card and
the precisions that the layers really have. One code path serves TensorRT 10 and 11: the network is
strongly typed, that is, its precisions are those of the ONNX file.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
import hashlib
from importlib.util import find_spec
import json
from pathlib import Path
import re
import time
from typing import Any

from anomaly_seg_ros.cuda import describe_gpu, Gpu, missing_cuda, select_gpu
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import atomic_write_bytes
from anomaly_seg_ros.model_card import ModelCard, ModelFile
from anomaly_seg_ros.ports import input_port, output_ports

COMPATIBILITY = ('none', 'ampere+', 'same-compute-capability')
_LEVELS = {'none': 'NONE', 'ampere+': 'AMPERE_PLUS',
           'same-compute-capability': 'SAME_COMPUTE_CAPABILITY'}

# (phase, steps done, steps in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EngineSettings:
    """
    How to build an engine.

    Attributes
    ----------
    workspace_mib
        Most GPU memory that a layer may use while it runs, in MiB; None leaves it to TensorRT.
    timing_cache
        File of measured kernel times, read and extended: later builds are faster and choose the
        same kernels. None: no file.
    hardware_compatibility
        ``none``: this GPU model only. ``ampere+``: any GPU from Ampere on, at some cost in speed.
        ``same-compute-capability``: GPUs of the same compute capability.
    optimization_level
        0 to 5, how long TensorRT searches; None leaves it to TensorRT.
    device
        Index of the CUDA device.

    """

    workspace_mib: int | None = None
    timing_cache: Path | None = None
    hardware_compatibility: str = 'none'
    optimization_level: int | None = None
    device: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ValueError(f'workspace_mib must be at least 1, got {self.workspace_mib}')
        if self.hardware_compatibility not in COMPATIBILITY:
            raise ValueError(f'hardware_compatibility must be one of {", ".join(COMPATIBILITY)}, '
                             f'got {self.hardware_compatibility!r}')
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise ValueError(f'optimization_level must be 0 to 5, got {self.optimization_level}')


@dataclass(frozen=True)
class EngineKey:
    """What an engine depends on: built for other values, it is useless or wrong."""

    model_sha256: str
    tensorrt: str
    gpu: str
    compute_capability: str
    hardware_compatibility: str
    precision: str
    ports: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """
    An engine file that has been read.

    Attributes
    ----------
    path
        Of the plan.
    key
        What it was built for.
    card
        The model's card.
    layer_precisions
        How many layers compute in which precision, by the engine's inspector.
    data
        The plan.

    """

    path: Path
    key: EngineKey
    card: ModelCard
    layer_precisions: Mapping[str, int]
    data: bytes


def missing_tensorrt() -> str | None:
    """Tell why TensorRT cannot be used here, or None where it can."""
    if find_spec('tensorrt') is None:
        return 'tensorrt is not installed'
    try:
        import tensorrt  # noqa: F401
    except (ImportError, OSError) as error:
        return f'tensorrt cannot be imported ({error})'
    return missing_cuda()


def engine_path(model: ModelFile) -> Path:
    """Return where the engine of a model file lies by default: beside it."""
    return model.path.with_suffix('.engine')


def record_path(engine: Path) -> Path:
    """Return the JSON file beside an engine."""
    return engine.with_name(engine.name + '.json')


def build_command(model: Path, engine: Path) -> str:
    """Return the command that builds an engine."""
    return f'anomaly-seg build-engine {model} --output {engine}'


def key_for(model: ModelFile, tensorrt_version: str, gpu: Gpu,
            hardware_compatibility: str) -> EngineKey:
    """Return the key of an engine of ``model`` built here."""
    ports = tuple(map(str, (input_port(model.card), *output_ports(model.card))))
    return EngineKey(model.sha256, tensorrt_version, gpu.name, gpu.compute_capability,
                     hardware_compatibility, model.card.precision, ports)


def build_engine(model: ModelFile, output: Path | str, settings: EngineSettings | None = None,
                 progress: Progress | None = None) -> Engine:
    """
    Build the TensorRT engine of a model file.

    Parameters
    ----------
    model
        A model file; its precision is the engine's.
    output
        The ``.engine`` to write; ``.engine.json`` comes beside it. Both are written only when
        the engine is found good.
    settings
        How to build it.
    progress
        Called with (phase, steps done, steps in all) while TensorRT works.

    Raises
    ------
    UserError
        If TensorRT or the GPU is missing, ``model`` is an engine, ``output`` is not named like
        one, an operator is not supported, memory runs out, the timing cache is damaged, or the
        engine does not have the precision that the card claims.

    """
    settings = settings or EngineSettings()
    reason = missing_tensorrt()
    if reason is not None:
        raise UserError(f'an engine cannot be built here: {reason}. Install the extra "tensorrt" '
                        'on the machine with the GPU that it is for.')
    import tensorrt as trt

    if model.path.suffix == '.engine':
        raise UserError(f'{model.path}: this is an engine already, of the GPU that it was built '
                        'on. Give the .onnx that it was built from.')
    output = Path(output)
    if output.suffix != '.engine':
        raise UserError(f'{output}: an engine is read by its name, which must end in .engine, '
                        f'such as {model.path.with_suffix(".engine").name}')
    refuse_cpu_int8(model)
    select_gpu(settings.device)
    gpu = describe_gpu(settings.device)
    log = make_logger(trt)
    builder = trt.Builder(log)
    # Ignored by TensorRT 11, where every network is strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(tensorrt_graph(model.data)):
        errors = '; '.join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise UserError(f'{model.path}: TensorRT {trt.__version__} cannot take this graph: '
                        f'{errors or log.text()}. Export it again with another network or '
                        'precision, or use --backend cuda.')
    config = builder.create_builder_config()
    _configure(trt, config, settings, progress)
    cache = _load_timing_cache(config, settings.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(_build_failure(model, log.text(), settings))
    data = bytes(plan)
    layers = _check_plan(trt, log, data, model)
    key = key_for(model, trt.__version__, gpu, settings.hardware_compatibility)
    _write(output, key, model.card, layers, data)
    if cache is not None and settings.timing_cache is not None:
        atomic_write_bytes(settings.timing_cache, bytes(cache.serialize()))
    return Engine(output, key, model.card, layers, data)


def load_engine(path: Path | str) -> Engine:
    """
    Read an engine and the JSON beside it.

    Raises
    ------
    UserError
        If one of them is missing or damaged, or they do not belong together.

    """
    path = Path(path)
    record = record_path(path)
    remedy = f'Build it with "{build_command(path.with_suffix(".onnx"), path)}".'
    try:
        data, text = path.read_bytes(), record.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: an engine is two files, {path.name} and {record.name}, and they '
                        f'cannot be read ({error}). {remedy}') from error
    try:
        values = json.loads(text)
        key = EngineKey(**{**values['key'], 'ports': tuple(values['key']['ports'])})
        card = ModelCard.from_json(json.dumps(values['card']))
        layers, digest = dict(values['layer_precisions']), values['engine_sha256']
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{record}: damaged ({type(error).__name__}: {error}). '
                        f'{remedy}') from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(f'{path}: damaged, or not the engine that {record.name} describes. '
                        f'{remedy}')
    return Engine(path, key, card, layers, data)


def check_engine(engine: Engine, model: ModelFile, tensorrt_version: str, gpu: Gpu) -> None:
    """Raise UserError, with the command that rebuilds it, unless the engine belongs here."""
    here = key_for(model, tensorrt_version, gpu, engine.key.hardware_compatibility)
    level = engine.key.hardware_compatibility
    differences = []
    for name, wanted in asdict(here).items():
        built = getattr(engine.key, name)
        if built == wanted or (name == 'gpu' and level != 'none'):
            continue
        if name == 'compute_capability' and level == 'ampere+' and float(wanted) >= 8.0:
            continue
        differences.append(f'{name} is {wanted}, it was built for {built}')
    if differences:
        onnx = model.path.with_suffix('.onnx')
        raise UserError(f'{engine.path}: this engine is stale or of another machine: '
                        f'{"; ".join(differences)}. Rebuild it here: '
                        f'"{build_command(onnx, engine.path)}".')


def refuse_cpu_int8(model: ModelFile) -> None:
    """Raise UserError if a model was quantised for something else than TensorRT."""
    target = model.card.parity.get('int8', {}).get('target', 'tensorrt')
    if target != 'tensorrt':
        raise UserError(f'{model.path}: this int8 file is made for {target}, with uint8 '
                        'activations, which TensorRT does not run. Export it with --int8-for '
                        'tensorrt.')


def tensorrt_graph(data: bytes) -> bytes:
    """
    Return the ONNX graph without what TensorRT refuses: uint8 inside.

    TensorRT has uint8 for inputs and outputs only, and converts only from and to floats. So casts
    to uint8 inside become int32, and the labels at the end go through float32, which holds class
    ids exactly.
    """
    import onnx

    model = onnx.load_from_string(data)
    graph = model.graph
    outputs = {port.name for port in graph.output
               if port.type.tensor_type.elem_type == onnx.TensorProto.UINT8}
    nodes = []
    for node in graph.node:
        if node.op_type == 'Cast':
            to = next(attribute for attribute in node.attribute if attribute.name == 'to')
            if to.i == onnx.TensorProto.UINT8:
                to.i = onnx.TensorProto.INT32
        for index, name in enumerate(node.output):
            if name in outputs:
                node.output[index] = f'{name}_int32'
        for index, name in enumerate(node.input):
            if name in outputs:
                node.input[index] = f'{name}_int32'
        nodes.append(node)
    for name in outputs:
        nodes.append(onnx.helper.make_node('Cast', [f'{name}_int32'], [f'{name}_float'],
                                           to=onnx.TensorProto.FLOAT))
        nodes.append(onnx.helper.make_node('Cast', [f'{name}_float'], [name],
                                           to=onnx.TensorProto.UINT8))
    replaced = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(replaced)
    # Types recorded for the tensors inside are those of before.
    del graph.value_info[:]
    return bytes(model.SerializeToString())


def float32_products(data: bytes) -> int:
    """Count the products of float32 matrices in an ONNX graph, such as the score's of masks."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(data)).graph
    types = {port.name: port.type.tensor_type.elem_type
             for port in (*graph.input, *graph.output, *graph.value_info)}
    types.update((constant.name, constant.data_type) for constant in graph.initializer)
    return sum(types.get(node.input[0]) == onnx.TensorProto.FLOAT for node in graph.node
               if node.op_type in ('Conv', 'ConvTranspose', 'Einsum', 'Gemm', 'MatMul'))


def make_logger(trt: Any) -> Any:
    """Return a TensorRT logger that keeps warnings and errors for messages of our own."""
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(msg)

        def text(self) -> str:
            return '; '.join(self.lines[-3:]) or 'TensorRT gave no reason'

    return Log()


def layer_precisions(information: str) -> dict[str, int]:
    """
    Count the layers that multiply matrices by the precision of their inputs.

    Parameters
    ----------
    information
        What ``EngineInspector.get_engine_information`` gives as JSON for an engine built with
        detailed profiling.

    """
    counts: dict[str, int] = {}
    for layer in json.loads(information).get('Layers', []):
        if not isinstance(layer, dict):
            raise UserError('the engine tells only the names of its layers; build it again with '
                            '"anomaly-seg build-engine"')
        if not re.search('conv|gemm|matrix|matmul|attention', str(layer.get('LayerType')), re.I):
            continue
        formats = ' '.join(str(port.get('Format/Datatype', port.get('Format', '')))
                           for port in layer.get('Inputs', []))
        precision = next((name for name, words in _PRECISION_WORDS.items()
                          if re.search(words, formats, re.I)), 'unknown')
        counts[precision] = counts.get(precision, 0) + 1
    return counts


# Two-part names first: a layer that mixes them computes in the lower precision.
_PRECISION_WORDS = {'int8': r'int8', 'fp8': r'fp8|e4m3', 'fp16': r'fp16|half',
                    'bf16': r'bf16|bfloat', 'fp32': r'fp32|float'}


def _configure(trt: Any, config: Any, settings: EngineSettings,
               progress: Progress | None) -> None:
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    config.hardware_compatibility_level = getattr(
        trt.HardwareCompatibilityLevel, _LEVELS[settings.hardware_compatibility])
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if progress is not None:
        config.progress_monitor = _make_monitor(trt, progress)


def _make_monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self.steps.get(phase_name, step + 1))
            return True

        def phase_finish(self, phase_name: str) -> None:
            steps = self.steps.pop(phase_name, 1)
            progress(phase_name, steps, steps)

    return Monitor()


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b''
    except OSError as error:
        raise UserError(f'{path}: the timing cache cannot be read ({error.strerror}). Give '
                        'another file, or leave --timing-cache out.') from error
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        raise UserError(f'{path}: damaged, or a timing cache of another TensorRT or GPU. Delete '
                        'it; the next build makes a new one.')
    return cache


def _build_failure(model: ModelFile, text: str, settings: EngineSettings) -> str:
    if re.search('out.?of.?memory|insufficient memory|bad_alloc|allocat', text, re.I):
        limit = (f'{settings.workspace_mib} MiB' if settings.workspace_mib is not None
                 else 'all that was free')
        remedy = (f'Memory ran out (workspace: {limit}). Close other programs on the GPU, or set '
                  'a smaller --workspace.')
    else:
        remedy = 'Export it again with another precision or size, or use --backend cuda.'
    return f'{model.path}: TensorRT could not build the engine: {text}. {remedy}'


def _check_plan(trt: Any, log: Any, data: bytes, model: ModelFile) -> dict[str, int]:
    """Load the plan once, and compare its layers' precisions with the card's claim."""
    engine = trt.Runtime(log).deserialize_cuda_engine(data)
    if engine is None:
        raise UserError(f'{model.path}: TensorRT built an engine that it cannot load: '
                        f'{log.text()}. Free GPU memory and build it again.')
    layers = layer_precisions(engine.create_engine_inspector().get_engine_information(
        trt.LayerInformationFormat.JSON))
    claimed = model.card.precision
    wrong = {name: count for name, count in layers.items() if name != claimed}
    if claimed == 'int8' and layers.get('int8'):
        wrong = {}  # quantised graphs keep some layers in float by design
    elif claimed == 'fp16' and layers.get('fp16') \
            and wrong.get('fp32', 0) <= float32_products(model.data):
        wrong.pop('fp32', None)
    if wrong or not layers:
        raise UserError(
            f'{model.path}: the card says {claimed}, but the layers of the engine compute in '
            f'{layers or "unknown precisions"}. Export the model again with --precision '
            f'{claimed}.')
    return layers


def _write(output: Path, key: EngineKey, card: ModelCard, layers: Mapping[str, int],
           data: bytes) -> None:
    values = {'key': asdict(key), 'card': json.loads(card.to_json()),
              'layer_precisions': dict(layers), 'engine_sha256': hashlib.sha256(data).hexdigest(),
              'built': time.strftime('%Y-%m-%d')}
    # The plan last: a record without its plan is refused, and so is an older plan beside it.
    atomic_write_bytes(record_path(output), json.dumps(values, indent=1, sort_keys=True).encode())
    atomic_write_bytes(output, data)
