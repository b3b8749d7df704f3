# SPDX-License-Identifier: Apache-2.0
"""
The launch file on the real launch and launch_ros, wherever these are installed.

They are not on PyPI, so a machine without a ROS 2 installation skips this; what the file itself
says is checked everywhere.
"""

import ast
from collections.abc import Iterator
from contextlib import closing
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import _needs_ros  # noqa: F401
from anomaly_seg_ros.ros.client import NodeClient, reserved_domain_id
from anomaly_seg_ros.ros.outputs import IMAGES
from anomaly_seg_ros.ros.parameters import NAMES
from anomaly_seg_ros.ros.transport import PROFILE_VARIABLES
import pytest
from ros_helpers import make_frame, write_tiny_model
import yaml

ROOT = Path(__file__).resolve().parent.parent
LAUNCH_FILE = ROOT / 'launch' / 'anomaly_seg.launch.py'

START = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
service = LaunchService(argv=sys.argv[2:])
arguments = [argument.split(':=', 1) for argument in sys.argv[2:]]
service.include_launch_description(LaunchDescription([
    IncludeLaunchDescription(PythonLaunchDescriptionSource(sys.argv[1]),
                             launch_arguments=arguments)]))
sys.exit(service.run())
"""


def literals() -> dict[str, object]:
    """Return the tables at the top of the launch file without importing launch."""
    found = {}
    for node in ast.parse(LAUNCH_FILE.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def test_launch_arguments_that_become_parameters_exist() -> None:
    assert set(literals()['PARAMETERS']) - {'use_sim_time'} <= NAMES


def test_every_file_that_the_launch_file_names_is_shipped() -> None:
    text = LAUNCH_FILE.read_text(encoding='utf-8')
    for name in ('anomaly_seg.yaml', 'fastdds.xml', 'anomaly_seg.rviz'):
        assert f"'{name}'" in text
        assert (ROOT / 'config' / name).is_file()
    assert (ROOT / 'config' / 'foxglove_layout.json').is_file()


def test_viewers_show_topics_that_the_node_publishes() -> None:
    topics = {f'/anomaly_seg/output/{name}' for name in IMAGES} | {'/camera/image_raw'}
    rviz = yaml.safe_load((ROOT / 'config' / 'anomaly_seg.rviz').read_text(encoding='utf-8'))
    shown = [display['Topic']['Value'] for display in rviz['Visualization Manager']['Displays']]
    assert len(shown) == 4 and set(shown) <= topics
    layout = json.loads((ROOT / 'config' / 'foxglove_layout.json').read_text(encoding='utf-8'))
    panels = layout['configById']
    assert {panel['imageMode']['imageTopic'] for name, panel in panels.items()
            if name.startswith('Image!')} == set(shown)

    def leaves(tree: object) -> list[str]:
        return [tree] if isinstance(tree, str) else leaves(tree['first']) + leaves(tree['second'])

    assert sorted(leaves(layout['layout'])) == sorted(panels)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Return an ament prefix with this checkout in it, as ``colcon build`` would make it."""
    pytest.importorskip('launch_ros', reason='needs launch_ros, which comes with ROS 2')
    share = tmp_path / 'share'
    index = share / 'ament_index' / 'resource_index' / 'packages'
    index.mkdir(parents=True)
    (index / 'anomaly_seg_ros').touch()
    (share / 'anomaly_seg_ros').mkdir()
    for name in ('config', 'launch', 'models'):
        (share / 'anomaly_seg_ros' / name).symlink_to(ROOT / name)
    program = tmp_path / 'lib' / 'anomaly_seg_ros' / 'anomaly_seg'
    program.parent.mkdir(parents=True)
    program.write_text(f'#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n'
                       'from anomaly_seg_ros.ros.__main__ import main\nsys.exit(main())\n')
    program.chmod(0o755)
    return tmp_path


@pytest.fixture
def domain_id() -> Iterator[int]:
    """Return a ROS domain of one's own."""
    with reserved_domain_id() as number:
        yield number


def launch(prefix: Path, domain_id: int, *arguments: str, file: Path = LAUNCH_FILE,
           **environment: str) -> 'subprocess.Popen[str]':
    """Start the launch file in a process of its own."""
    return subprocess.Popen(
        [sys.executable, '-c', START, str(file), *arguments], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, 'AMENT_PREFIX_PATH': str(prefix), 'ROS_DOMAIN_ID': str(domain_id),
             'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST', 'ROS_LOG_DIR': str(prefix / 'log'),
             **environment})


def finish(process: 'subprocess.Popen[str]') -> str:
    """Interrupt the launch, unless it has ended, and return what it wrote."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    try:
        return process.communicate(timeout=20)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def check_answer(process: 'subprocess.Popen[str]', domain_id: int) -> dict[str, str]:
    """Wait for the node of a launch, let it answer a frame, and return its diagnostics."""
    with closing(NodeClient(domain_id, ('labels',))) as client:
        for _ in range(600):
            client.spin(0.05)
            if client.ready or process.poll() is not None:
                break
        assert client.ready, finish(process)
        client.send(make_frame(1), 42)
        for _ in range(200):
            client.spin(0.05)
            if 42 in client.complete():
                break
        assert 42 in client.complete()
        return client.diagnostics


def children(process: 'subprocess.Popen[str]') -> list[str]:
    """Return the ids of the processes that a launch has started."""
    return Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()


def test_the_launch_file_starts_a_node_that_answers(prefix: Path, domain_id: int) -> None:
    """Arguments go before the parameter file, remapping and transport profile arrive."""
    model = write_tiny_model(prefix / 'tiny.onnx')
    other = write_tiny_model(prefix / 'other.onnx', name='other')
    file = prefix / 'mine.yaml'
    file.write_text(yaml.safe_dump({'/**': {'ros__parameters': {
        'model': str(other), 'minimum_area_px': 77, 'diagnostics_period_s': 0.1}}}))
    process = launch(prefix, domain_id, f'model:={model}', f'params_file:={file}',
                     'image:=/anomaly_seg/input/image')
    try:
        diagnostics = check_answer(process, domain_id)
        assert diagnostics['model.name'] == 'tiny'
        assert diagnostics['model.minimum_area_px'] == '77'
        environments = [Path(f'/proc/{pid}/environ').read_text() for pid in children(process)]
        assert any(f'{PROFILE_VARIABLES[0]}={prefix}/share/anomaly_seg_ros/config/fastdds.xml'
                   in text for text in environments)
    finally:
        finish(process)


@pytest.mark.parametrize('respawn', [True, False])
def test_a_node_that_was_killed_comes_back_on_request(prefix: Path, domain_id: int,
                                                      respawn: bool) -> None:
    """Without being asked to, the launch ends with it."""
    process = launch(prefix, domain_id, 'image:=/anomaly_seg/input/image',
                     f'model:={write_tiny_model(prefix / "tiny.onnx")}',
                     f'respawn:={str(respawn).lower()}')
    try:
        check_answer(process, domain_id)
        node, = children(process)
        os.kill(int(node), signal.SIGKILL)
        if respawn:
            check_answer(process, domain_id)
        else:
            process.wait(timeout=20)
    finally:
        finish(process)


def test_the_launch_file_leaves_a_profile_of_the_user_alone(prefix: Path,
                                                            domain_id: int) -> None:
    show = prefix / 'show.py'
    show.write_text(
        'import sys; sys.argv = ["x"]\n'
        'from launch.launch_description_sources import '
        'get_launch_description_from_python_launch_file as read\n'
        f'description = read({str(LAUNCH_FILE)!r})\n'
        'print([type(entity).__name__ for entity in description.entities])\n')
    mine = dict.fromkeys(PROFILE_VARIABLES, '/mine.xml')
    for given, expected in (({}, 2), ({PROFILE_VARIABLES[0]: '/mine.xml'}, 1), (mine, 0)):
        environment = {k: v for k, v in os.environ.items() if k not in PROFILE_VARIABLES}
        text = subprocess.run(
            [sys.executable, str(show)], capture_output=True, text=True, check=True, timeout=60,
            env={**environment, 'AMENT_PREFIX_PATH': str(prefix), **given}).stdout
        assert text.count('SetEnvironmentVariable') == expected
        assert text.count('DeclareLaunchArgument') == 13


@pytest.mark.parametrize(('argument', 'said'), [
    ('autostart:=maybe', 'launch argument autostart must be true or false'),
    ('rviz:=maybe', 'launch argument rviz must be true or false'),
    ('respawn:=maybe', 'launch argument respawn must be true or false'),
    ('rviz:=true', "package 'rviz2' not found"),
    ('foxglove:=true', "package 'foxglove_bridge' not found"),
    ('params_file:=/nowhere.yaml', "launch argument params_file: no file '/nowhere.yaml'")])
def test_a_wrong_argument_is_told_before_anything_starts(prefix: Path, domain_id: int,
                                                         argument: str, said: str) -> None:
    process = launch(prefix, domain_id, argument)
    text = process.communicate(timeout=60)[0]
    assert said in text
    assert process.returncode != 0
    assert 'process started' not in text


def stand_in(path: Path, said: Path) -> None:
    """Write a program that only writes down its arguments."""
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\necho "$@" > {said}.part && mv {said}.part {said}\n')
    path.chmod(0o755)


@pytest.mark.parametrize(('file', 'arguments', 'camera', 'played'), [
    ('replay', ['bag:=b'], '/camera/image_raw',
     '--remap /anomaly_seg/input/image:=/camera/image_raw'),
    ('replay', ['bag:=b', 'node:=true', 'image:=/front/image_raw'], '/front/image_raw',
     '--delay 3'),
    ('anomaly_seg', ['rviz:=true', 'image:=/front/image_raw'], '/front/image_raw', None),
    ('anomaly_seg', ['rviz:=true', 'image:=/f/image_raw/compressed'], '/f/image_raw', None)])
def test_rviz_shows_the_camera(prefix: Path, domain_id: int, file: str, arguments: list[str],
                               camera: str, played: str | None) -> None:
    """With stand-ins for rviz2 and "ros2", which come with ROS as well."""
    (prefix / 'share' / 'ament_index' / 'resource_index' / 'packages' / 'rviz2').touch()
    stand_in(prefix / 'lib' / 'rviz2' / 'rviz2', prefix / 'shown')
    stand_in(prefix / 'tools' / 'ros2', prefix / 'played')
    process = launch(prefix, domain_id, *arguments, file=ROOT / 'launch' / f'{file}.launch.py',
                     PATH=f'{prefix / "tools"}:{os.environ["PATH"]}')
    expected = [prefix / 'shown', *([] if played is None else [prefix / 'played'])]
    for _ in range(300):
        if all(path.exists() for path in expected):
            break
        time.sleep(0.1)
    text = finish(process)
    assert all(path.exists() for path in expected), text
    shown = expected[0].read_text()
    assert f'-r /camera/image_raw:={camera}' in shown and 'config/anomaly_seg.rviz' in shown
    if played is not None:
        assert expected[1].read_text().strip().endswith(played)


def test_rviz_shows_a_node_of_another_name(prefix: Path, domain_id: int) -> None:
    (prefix / 'share' / 'ament_index' / 'resource_index' / 'packages' / 'rviz2').touch()
    stand_in(prefix / 'lib' / 'rviz2' / 'rviz2', prefix / 'shown')
    process = launch(prefix, domain_id, 'rviz:=true', 'namespace:=/front', 'name:=seg')
    for _ in range(300):
        if (prefix / 'shown').exists():
            break
        time.sleep(0.1)
    text = finish(process)
    assert (prefix / 'shown').exists(), text
    shown = (prefix / 'shown').read_text()
    rviz = yaml.safe_load((ROOT / 'config' / 'anomaly_seg.rviz').read_text(encoding='utf-8'))
    for topic in (display['Topic']['Value']
                  for display in rviz['Visualization Manager']['Displays']):
        if topic.startswith('/anomaly_seg/'):
            assert f'-r {topic}:={topic.replace("/anomaly_seg/", "/front/seg/")}' in shown


def test_the_replay_launch_file_plays_a_bag_through_the_node(prefix: Path,
                                                             domain_id: int) -> None:
    """With a stand-in for "ros2", which comes with ROS as well; the node is the real one."""
    model = write_tiny_model(prefix / 'tiny.onnx')
    tools = prefix / 'tools'
    stand_in(tools / 'ros2', prefix / 'played')
    process = launch(prefix, domain_id, 'bag:=/some/bag', 'node:=true', 'rviz:=false',
                     'rate:=2.0', f'model:={model}', file=ROOT / 'launch' / 'replay.launch.py',
                     PATH=f'{tools}:{os.environ["PATH"]}')
    client = NodeClient(domain_id, ())
    try:
        for _ in range(600):
            client.spin(0.05)
            if client.diagnostics.get('node.state') == 'active' or process.poll() is not None:
                break
        assert client.diagnostics.get('node.state') == 'active', finish(process)
        assert client.diagnostics['input.topic'] == '/camera/image_raw'
        assert (prefix / 'played').read_text().split() == [
            'bag', 'play', '/some/bag', '--clock', '--rate', '2.0', '--delay', '3']
    finally:
        client.close()
        finish(process)
