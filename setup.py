# SPDX-License-Identifier: Apache-2.0
"""Build for both worlds: an ament_python package and a plain pip package."""

from glob import glob
from pathlib import Path
import re

from setuptools import find_packages, setup

package_name = 'anomaly_seg_ros'
with open(f'{package_name}/__init__.py', encoding='utf-8') as stream:
    version = re.search(r"__version__ = '([^']+)'", stream.read()).group(1)

messages = '5.3.6'
extras = {
    # Real rclpy without an apt install (Jazzy). Not for use beside a sourced /opt/ros.
    'ros': [
        'ros-rclpy[fastrtps]==7.1.6', f'ros-sensor-msgs=={messages}', f'ros-std-msgs=={messages}',
        f'ros-diagnostic-msgs=={messages}', f'ros-geometry-msgs=={messages}',
        'ros-lifecycle-msgs', 'ros-builtin-interfaces', 'ros-rcl-interfaces'],
    # Exactly this torch: a plain "torch" takes the newest and gigabytes of CUDA with it.
    'export': ['torch==2.13.0', 'onnx>=1.18', 'onnxscript>=0.5', 'safetensors>=0.4'],
    'networks': ['transformers>=5.0', 'scipy>=1.10', 'pillow>=10'],
    # CUDA 13, as TensorRT below. From 1.25 on (April 2026) its CUDA kernels know the operators of
    # opset 20; from 1.28 on its own extras name libraries of CUDA 13 that there are.
    'cuda': ['onnxruntime-gpu[cuda,cudnn]>=1.28', 'cuda-bindings>=13,<14'],
    'tensorrt': ['tensorrt-cu13==10.16.1.11', 'cuda-bindings>=13,<14', 'onnx>=1.18'],
    'openvino': ['openvino>=2025.0'],
    'report': ['matplotlib>=3.7', 'jinja2>=3.1'],
    'ray': ['ray[client]>=2.40'],
    'submission': ['h5py>=3.8'],
}
extras['test'] = [
    'pytest>=8', 'pytest-timeout>=2.3', 'hypothesis>=6.100', 'scikit-learn>=1.4', 'scipy>=1.10',
    'psutil>=5.9', 'rosbags-image>=0.10', 'mcap>=1.2', 'pillow>=10',
    'ruff', 'mypy>=1.11', 'types-PyYAML', 'flake8>=7',
    'flake8-import-order', 'flake8-quotes', 'flake8-comprehensions', 'flake8-builtins',
    'flake8-docstrings', 'colcon-common-extensions']

setup(
    name=package_name,
    version=version,
    description='What in this camera image does my segmentation network not know: real-time '
                'anomaly segmentation for ROS 2, with exact benchmark metrics',
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    maintainer='The anomaly_seg_ros developers',
    maintainer_email='maintainers@anomaly-seg-ros.invalid',
    packages=find_packages(include=[package_name, f'{package_name}.*']),
    package_data={package_name: ['templates/*', 'py.typed']},
    data_files=[
        ('share/ament_index/resource_index/packages', [f'resource/{package_name}']),
        (f'share/{package_name}', ['package.xml']),
        (f'share/{package_name}/launch', glob('launch/*.launch.py')),
        (f'share/{package_name}/config', glob('config/*')),
        (f'share/{package_name}/models', glob('models/*.onnx') + glob('models/*.yaml')
         + glob('models/*.md')),
    ],
    python_requires='>=3.10',
    # What a vehicle needs, and no more. rclpy comes from ROS. simplejpeg (libjpeg-turbo) notices
    # a JPEG whose code is broken, where OpenCV fills up with grey.
    install_requires=[
        'numpy>=1.24', 'opencv-python-headless>=4.6', 'onnxruntime>=1.18', 'rosbags>=0.11.7',
        'backports.zstd>=1; python_version < "3.14"', 'simplejpeg>=1.7', 'pyyaml>=6', 'click>=8',
        'rich>=13'],
    extras_require=extras,
    zip_safe=True,
    entry_points={
        'console_scripts': [
            'anomaly-seg = anomaly_seg_ros.cli:main',
            'anomaly_seg = anomaly_seg_ros.ros.__main__:main',
        ],
    },
)
