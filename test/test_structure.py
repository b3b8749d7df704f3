# SPDX-License-Identifier: Apache-2.0
"""What the package promises about itself: light imports, equal versions, whole packaging."""

import ast
import os
from pathlib import Path
import re
import runpy
import subprocess
import sys
from xml.etree import ElementTree

import anomaly_seg_ros
from anomaly_seg_ros.export import OPSET
from packaging.requirements import Requirement
import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'anomaly_seg_ros'

HEAVY = ('torch', 'onnx', 'onnxscript', 'onnxruntime', 'matplotlib', 'jinja2', 'transformers',
         'openvino', 'tensorrt', 'ray', 'rclpy', 'scipy', 'sklearn', 'h5py')
# The only places that may import a heavy library at module level.
MAY_IMPORT = {'rclpy': 'ros/', 'torch': 'networks/', 'transformers': 'networks/'}


def core_modules() -> list[str]:
    """Return every module but the node and the networks' architectures."""
    names = []
    for path in sorted(PACKAGE.rglob('*.py')):
        relative = path.relative_to(PACKAGE).as_posix()
        if relative.startswith('ros/') or (
                relative.startswith('networks/') and relative != 'networks/__init__.py'):
            continue
        names.append('.'.join(('anomaly_seg_ros', *path.relative_to(PACKAGE).with_suffix('').parts)
                              ).removesuffix('.__init__'))
    return names


def test_core_imports_no_heavy_library() -> None:
    """In a fresh interpreter, importing the whole core loads none of the heavy libraries."""
    code = (f'import importlib, sys\n'
            f'for name in {core_modules()!r}: importlib.import_module(name)\n'
            f'print([name for name in {HEAVY!r} if name in sys.modules])\n')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                            check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == '[]'


@pytest.mark.parametrize('library', HEAVY)
def test_module_level_imports_of_heavy_libraries_are_where_they_belong(library: str) -> None:
    """Architectures may import torch and the node rclpy; everything else imports on use."""
    pattern = re.compile(rf'^(import {library}\b|from {library}\b)', re.MULTILINE)
    found = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob('*.py')
             if pattern.search(path.read_text(encoding='utf-8'))]
    allowed = MAY_IMPORT.get(library)
    assert [name for name in found if allowed is None or not name.startswith(allowed)] == []


def test_extras_for_gpus_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries and bindings of CUDA come along, of one CUDA, with kernels for our opset."""
    found: dict[str, dict[str, list[str]]] = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, 'setup', lambda **values: found.update(values))
    runpy.run_path('setup.py')
    extras = {name: {x.name: x for x in map(Requirement, found['extras_require'][name])}
              for name in ('cuda', 'tensorrt')}
    runtime = extras['cuda']['onnxruntime-gpu']
    assert runtime.extras == {'cuda', 'cudnn'}
    assert OPSET == 20 and '1.24.4' not in runtime.specifier and '1.28.0' in runtime.specifier
    for extra in extras.values():
        assert {v for v in ('12.9', '13.0.3', '14.0') if v in extra['cuda-bindings'].specifier} \
            == {'13.0.3'}
    assert {'tensorrt-cu13', 'onnx'} <= extras['tensorrt'].keys()


def test_versions_agree() -> None:
    """package.xml, the module and the changelog name one version."""
    xml = ElementTree.parse(ROOT / 'package.xml').getroot()
    assert xml.findtext('version') == anomaly_seg_ros.__version__
    assert f'\n{anomaly_seg_ros.__version__} (' in (ROOT / 'CHANGELOG.rst').read_text()


# Module -> its name in package.xml and on PyPI, where it has another there.
NAMES = {'cv2': ('python3-opencv', 'opencv-python-headless'), 'yaml': ('python3-yaml', 'pyyaml'),
         'onnxruntime': ('python3-onnxruntime-pip', 'onnxruntime'),
         'rosbags': ('python3-rosbags-pip', 'rosbags'),
         'simplejpeg': ('python3-simplejpeg-pip', 'simplejpeg'),
         **{name: (f'python3-{name}', name) for name in ('numpy', 'click', 'rich')}}
ROS = {'rclpy', 'builtin_interfaces', 'diagnostic_msgs', 'rcl_interfaces', 'sensor_msgs',
       'std_msgs', 'vision_msgs', 'ament_index_python', 'launch', 'launch_ros'}
# Of extras, or (compression) of Python 3.14.
OPTIONAL = {'torch', 'onnx', 'matplotlib', 'jinja2', 'h5py', 'tensorrt', 'cuda', 'transformers',
            'safetensors', 'huggingface_hub', 'segmentation_models_pytorch', 'ray', 'openvino',
            'compression'}


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    """In package.xml for rosdep and in setup.py for pip."""
    imported = set()
    for path in (*PACKAGE.rglob('*.py'), *(ROOT / 'launch').glob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                imported.add(str(name).split('.')[0])
    imported -= {*sys.stdlib_module_names, 'anomaly_seg_ros', *OPTIONAL}
    # rosbags brings backports.zstd, which has no rosdep key.
    assert imported == {*NAMES, *ROS, 'backports'}
    xml = ElementTree.parse(ROOT / 'package.xml').getroot()
    assert {each.text for each in xml.iter('exec_depend')} == {
        *ROS, *(key for key, _ in NAMES.values()), 'ros2bag', 'rosbag2_storage_mcap'}
    required, = re.findall(r'install_requires=\[(.*?)\]', (ROOT / 'setup.py').read_text(), re.S)
    assert set(re.findall(r"'([\w.-]+)>=", required)) == {
        *(name for _, name in NAMES.values()), 'backports.zstd'}


@pytest.mark.parametrize('packages', ['.', 'lib/python3.12/site-packages'])
def test_shipped_files_are_found_wherever_pip_puts_them(tmp_path: Path, packages: str) -> None:
    """With --target, and with --prefix or --user, whose share Python does not know of."""
    code = tmp_path / packages / 'anomaly_seg_ros'
    code.mkdir(parents=True)
    for name in ('__init__.py', 'errors.py', 'resources.py'):
        (code / name).write_bytes((PACKAGE / name).read_bytes())
    shipped = tmp_path / 'share' / 'anomaly_seg_ros' / 'models' / 'demo.onnx'
    shipped.parent.mkdir(parents=True)
    shipped.touch()
    result = subprocess.run(
        [sys.executable, '-c', 'from anomaly_seg_ros.resources import resource; '
         'print(resource("models/demo.onnx"))'], capture_output=True, text=True, check=False,
        cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path / packages)})
    assert result.stdout.strip() == str(shipped), result.stderr


def test_every_file_has_a_licence_line() -> None:
    """Each Python file starts with its SPDX line."""
    files = [*PACKAGE.rglob('*.py'), *(ROOT / 'test').rglob('*.py'),
             *(ROOT / 'launch').glob('*.py'), *(ROOT / 'benchmarks').glob('*.py'),
             *(ROOT / 'models').glob('*.py'), ROOT / 'setup.py']
    without = [path.name for path in files
               if '# SPDX-License-Identifier: Apache-2.0' not in path.read_text()[:200]]
    assert without == []


def test_no_file_over_five_megabytes() -> None:
    """Only small files are shipped; the bundled model is the largest."""
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip('not a git checkout')
    large = [name for name in listed.stdout.decode().split('\0')
             if name and (ROOT / name).is_file() and (ROOT / name).stat().st_size > 5_000_000]
    assert large == []


def test_bundled_model_is_whole_small_and_says_nothing_of_its_maker() -> None:
    """It loads, has at most 5 MB, and holds no paths of the machine that exported it."""
    from anomaly_seg_ros.model_file import load_model_file
    model = load_model_file(ROOT / 'models' / 'demo.onnx')
    assert len(model.data) <= 5_000_000
    assert b'site-packages' not in model.data and b'.py"' not in model.data
