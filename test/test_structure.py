# SPDX-License-Identifier: Apache-2.0
"""What the package promises about itself: light imports, equal versions, whole packaging."""

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
