# SPDX-License-Identifier: Apache-2.0
"""
Every name that the code takes from TensorRT 10, TensorRT 11 and CUDA exists in the real bindings.

The bindings are installed from PyPI into pytest's cache. Their native libraries are replaced by
empty ones that are compiled here: enough to import them and to look, not to run anything.
"""

import ast
from collections.abc import Iterator
import inspect
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
from typing import Any

from anomaly_seg_ros import cuda, engine
from anomaly_seg_ros.backends import tensorrt
import fake_cuda
import fake_tensorrt
import pytest

TENSORRT = ('10.16.1.11', '11.4.0.106')
CUDA = ('cuda-bindings==13.0.3', 'cuda-pathfinder')
SYMBOLS = ('createInferBuilder_INTERNAL', 'createInferRefitter_INTERNAL',
           'createInferRuntime_INTERNAL', 'createNvOnnxParserRefitter_INTERNAL',
           'createNvOnnxParser_INTERNAL', 'getBuilderPluginRegistry', 'getNvOnnxParserVersion',
           'getPluginRegistry', 'initLibNvInferPlugins')

# What the objects are called in the code, and their classes.
OBJECTS = {
    'builder': 'Builder', 'network': 'INetworkDefinition', 'parser': 'OnnxParser',
    'config': 'IBuilderConfig', 'cache': 'ITimingCache',
    'engine': 'ICudaEngine', '_engine': 'ICudaEngine',
    '_context': 'IExecutionContext', '_runtime': 'Runtime', 'Runtime': 'Runtime',
    'create_engine_inspector': 'EngineInspector'}


class Uses(ast.NodeVisitor):
    """Collect (class or '', name, number of arguments or None) from code that uses TensorRT."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str, int | None]] = set()

    def visit_Call(self, node: ast.Call) -> None:
        """Record calls with the number of their arguments."""
        if isinstance(node.func, ast.Attribute):
            # The base class's constructor is called on the class, with self.
            bound = node.func.attr == '__init__'
            self._record(node.func, len(node.args) - bound)
            self.visit(node.func.value)
            for argument in (*node.args, *node.keywords):
                self.visit(argument)
        else:
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Record attributes that are not called."""
        self._record(node, None)
        self.generic_visit(node)

    def _record(self, node: ast.Attribute, arguments: int | None) -> None:
        owner = node.value
        if isinstance(owner, ast.Name) and owner.id == 'trt':
            self.found.add(('', node.attr, arguments))
        elif isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) \
                and owner.value.id == 'trt':
            self.found.add((owner.attr, node.attr, arguments))
        else:
            if isinstance(owner, ast.Call):
                owner = owner.func
            name = getattr(owner, 'attr', getattr(owner, 'id', ''))
            if name in OBJECTS:
                self.found.add((OBJECTS[name], node.attr, arguments))


def tensorrt_uses() -> list[tuple[str, str, int | None]]:
    """Return what engine.py and the backend take from TensorRT."""
    uses = Uses()
    functions = [engine.build_engine, engine.make_logger, engine._configure, engine._make_monitor,
                 engine._load_timing_cache, engine._check_plan, tensorrt.EngineRunner]
    for function in functions:
        source = inspect.getsource(function)
        uses.visit(ast.parse(inspect.cleandoc(source) if source.startswith(' ') else source))
    return sorted(uses.found, key=str)


def install(requirements: tuple[str, ...], folder: Path) -> None:
    """Install wheels into a folder, once; skip where that is not possible."""
    if (folder / 'complete').exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    result = subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--only-binary=:all:',
         '--disable-pip-version-check', '--target', str(folder), *requirements],
        capture_output=True, text=True, timeout=240, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ['pip failed']
        pytest.skip(f'{", ".join(requirements)} cannot be installed from PyPI: {lines[-1]}')
    (folder / 'complete').touch()


@pytest.fixture(scope='session')
def cache(request: pytest.FixtureRequest) -> Path:
    """Return a folder that stays from run to run."""
    if request.config.cache is None:
        pytest.skip('pytest runs without its cache')
    return request.config.cache.mkdir('bindings')


@pytest.fixture(scope='session', params=TENSORRT)
def bindings(request: pytest.FixtureRequest, cache: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield a version of the real bindings and the environment in which they can be imported."""
    version = request.param
    compiler = shutil.which('gcc') or shutil.which('cc')
    if compiler is None:
        pytest.skip('no C compiler for the empty libraries')
    folder = cache / f'tensorrt-{version}'
    install((f'tensorrt-cu13-bindings=={version}',), folder)
    source = folder / 'empty.c'
    source.write_text(''.join(f'void *{name}(void) {{ return 0; }}\n' for name in SYMBOLS))
    for library in ('nvinfer', 'nvinfer_plugin', 'nvonnxparser'):
        subprocess.run([compiler, '-shared', '-fPIC', '-o',
                        folder / f'lib{library}.so.{version.split(".")[0]}', source], check=True)
    root = Path(engine.__file__).resolve().parent.parent
    yield version, {**os.environ, 'LD_LIBRARY_PATH': str(folder),
                    'PYTHONPATH': os.pathsep.join([str(folder), str(root)])}


LOOK = """
import json, sys
import tensorrt_bindings as trt
from anomaly_seg_ros.engine import _make_monitor, make_logger

uses = json.loads(sys.argv[1])
answers = []
for owner, name, arguments in uses:
    holder = getattr(trt, owner, None) if owner else trt
    value = getattr(holder, name, None)
    document = (value.__init__ if isinstance(value, type) else value).__doc__ or ''
    answers.append([holder is not None and hasattr(holder, name), document])
log = make_logger(trt)
log.log(trt.ILogger.Severity.ERROR, 'first')
log.log(trt.ILogger.Severity.INFO, 'second')
steps = []
monitor = _make_monitor(trt, lambda *step: steps.append(step))
monitor.phase_start('a', None, 2)
assert monitor.step_complete('a', 0) is True
monitor.phase_finish('a')
print(json.dumps({'version': trt.__version__, 'answers': answers, 'log': log.text(),
                  'steps': steps, 'flag': int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)}))
"""


def ask(uses: Any, environment: dict[str, str]) -> dict[str, Any]:
    """Look names up in the real bindings, in a process of their own."""
    result = subprocess.run([sys.executable, '-c', LOOK, json.dumps(uses)], env=environment,
                            capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def allowed_counts(document: str) -> set[int]:
    """Return how many arguments, self left out, pybind11's signatures in a docstring allow."""
    counts = set()
    for signature in re.findall(r'^(?:\d+\. )?\w+\((self[^\n]*)\)(?: ->|$)', document, re.M):
        depth, parameters = 0, ['']
        for character in signature:
            depth += (character in '[(<') - (character in '])>')
            if character == ',' and depth == 0:
                parameters.append('')
            else:
                parameters[-1] += character
        optional = sum('=' in parameter for parameter in parameters[1:])
        counts |= set(range(len(parameters) - 1 - optional, len(parameters)))
    return counts


def test_the_code_uses_what_is_expected_of_it() -> None:
    """The collector sees the calls: a few that must be among them, so that it cannot be empty."""
    uses = tensorrt_uses()
    for expected in (('Builder', 'build_serialized_network', 2), ('OnnxParser', 'parse', 1),
                     ('IExecutionContext', 'execute_async_v3', 1), ('', 'ILogger', None),
                     ('IExecutionContext', 'set_input_shape', 2),
                     ('ICudaEngine', 'get_tensor_shape', 1),
                     ('NetworkDefinitionCreationFlag', 'STRONGLY_TYPED', None),
                     ('EngineInspector', 'get_engine_information', 1),
                     ('IBuilderConfig', 'set_timing_cache', 2), ('Runtime',
                                                                 'deserialize_cuda_engine', 1)):
        assert expected in uses
    assert len(uses) > 50


def test_names_and_arguments_exist_in_both_tensorrts(bindings: tuple[str, dict[str, str]]) -> None:
    """Every class, method, property, enum member, and every number of arguments."""
    version, environment = bindings
    uses = tensorrt_uses()
    answer = ask(uses, environment)
    assert answer['version'] == version
    wrong = []
    for (owner, name, arguments), (exists, document) in zip(uses, answer['answers'], strict=True):
        if not exists:
            wrong.append(f'{owner}.{name} does not exist')
        elif arguments is not None and allowed_counts(document) \
                and arguments not in allowed_counts(document):
            wrong.append(f'{owner}.{name} takes {allowed_counts(document)} arguments, '
                         f'not {arguments}')
    assert wrong == []
    checked = sum(bool(allowed_counts(document)) for (*_, arguments), (_, document)
                  in zip(uses, answer['answers'], strict=True) if arguments is not None)
    assert checked >= 25


def test_logger_and_monitor_are_made_of_the_real_classes(bindings: tuple[str, dict[str, str]]
                                                         ) -> None:
    """They can be constructed and called; only errors are kept."""
    answer = ask([], bindings[1])
    assert answer['log'] == 'first'
    assert answer['steps'] == [['a', 0, 2], ['a', 1, 2], ['a', 2, 2]]
    assert 1 << answer['flag'] in (1, 2)


def test_the_stand_in_has_no_name_of_its_own(bindings: tuple[str, dict[str, str]]) -> None:
    """What the fake TensorRT offers, the real one does too."""
    classes = {**fake_tensorrt.make(fake_tensorrt.State(fake_cuda.FakeCuda())),
               'ILogger': fake_tensorrt.ILogger}
    uses = [(owner, name, None) for owner, made in classes.items() for name in vars(made)
            if not name.startswith('_')]
    uses += [(enum.__name__, name, None) for enum in fake_tensorrt.ENUMS
             for name in enum.__members__]
    # Attributes that the real classes hold, and instances only in the fake.
    answer = ask(uses, bindings[1])
    missing = [f'{owner}.{name}' for (owner, name, _), (exists, _)
               in zip(uses, answer['answers'], strict=True) if not exists]
    assert missing == []
    assert len(uses) > 35


def cuda_uses() -> list[tuple[str, int | None]]:
    """Return what cuda.py takes from cuda.bindings.runtime: names and numbers of arguments."""
    found: set[tuple[str, int | None]] = set()
    for node in ast.walk(ast.parse(inspect.getsource(cuda))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) \
                and re.match(r'cuda[A-Z]', node.func.attr):
            found.add((node.func.attr, len(node.args)))
        elif isinstance(node, ast.Attribute) and re.match(r'cuda[A-Z]', node.attr):
            found.add((node.attr, None))
    return sorted(found, key=str)


def test_names_and_arguments_exist_in_cuda_bindings(cache: Path) -> None:
    """And without a driver the real runtime's error becomes a reason, not a crash."""
    folder = cache / 'cuda'
    install(CUDA, folder)
    code = """
import inspect, json, sys
from cuda.bindings import runtime
from anomaly_seg_ros.cuda import missing_cuda
wrong = []
for name, arguments in json.loads(sys.argv[1]):
    holders = [runtime, runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode]
    holder = next((x for x in holders if hasattr(x, name)), None)
    if holder is None:
        wrong.append(name)
    elif arguments is not None:
        count = len(inspect.signature(getattr(holder, name)).parameters)
        if count != arguments:
            wrong.append(f'{name} takes {count}, not {arguments}')
print(json.dumps([wrong, missing_cuda()]))
"""
    root = Path(engine.__file__).resolve().parent.parent
    uses = cuda_uses()
    assert ('cudaMemcpyAsync', 5) in uses
    assert len(uses) > 20
    result = subprocess.run(
        [sys.executable, '-c', code, json.dumps(uses)], capture_output=True, text=True,
        check=False, env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(folder), str(root)])})
    assert result.returncode == 0, result.stderr
    wrong, reason = json.loads(result.stdout)
    assert wrong == []
    assert reason is None or reason.startswith('no CUDA GPU')
    fake = {name for name in dir(fake_cuda.FakeCuda) if name.startswith('cuda')}
    assert fake <= {name for name, _ in uses}
