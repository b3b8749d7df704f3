# SPDX-License-Identifier: Apache-2.0
"""
Play a bag in rviz2 or Foxglove: a result bag by itself, or any bag through the live node.

    ros2 launch anomaly_seg_ros replay.launch.py bag:=results/result_bag
    ros2 launch anomaly_seg_ros replay.launch.py bag:=drive.mcap node:=true model:=erfnet.onnx
"""

import os

from ament_index_python.packages import get_package_prefix, get_package_share_directory
from anomaly_seg_ros.ros.launching import boolean
from anomaly_seg_ros.ros.transport import profile_environment
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import (
    DeclareLaunchArgument, ExecuteProcess, GroupAction, IncludeLaunchDescription, OpaqueFunction,
    SetEnvironmentVariable)
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

# What config/anomaly_seg.rviz and config/foxglove_layout.json show as the camera.
CAMERA = '/camera/image_raw'
# name -> default, description; None: must be given.
ARGUMENTS = {
    'bag': (None, 'The bag: folder or file.'),
    'rate': ('1.0', 'How many times as fast as recorded.'),
    'delay': ('', 'Seconds before the first message; by default 3 with the node, which has to '
                  'load its model, else 0.'),
    'node': ('false', 'Run the node on the bag. A result bag holds its outputs already.'),
    'model': ('', 'Model file for the node; by default the bundled one.'),
    'image': (CAMERA, 'Topic of the camera image in the bag; a result bag needs none.'),
    'rviz': ('true', 'Start rviz2 with config/anomaly_seg.rviz.'),
    'foxglove': ('false', 'Start foxglove_bridge; open config/foxglove_layout.json in the app.'),
}


def generate_launch_description() -> LaunchDescription:
    """Return what ``ros2 launch`` carries out."""
    config = os.path.join(get_package_share_directory('anomaly_seg_ros'), 'config')
    actions = [DeclareLaunchArgument(name, default_value=default, description=description)
               for name, (default, description) in ARGUMENTS.items()]
    # Fast DDS loses frames of several megabytes unless told otherwise.
    variables = profile_environment(os.environ, os.path.join(config, 'fastdds.xml'))
    actions += [SetEnvironmentVariable(*variable) for variable in variables.items()]
    return LaunchDescription([*actions, OpaqueFunction(function=start)])


def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """
    Return the node, the viewers and the bag; what can be wrong is checked before any starts.

    A launch that fails with a process on its way leaves that process running.
    """
    share = get_package_share_directory('anomaly_seg_ros')
    value = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    actions: list[LaunchDescriptionEntity] = []
    # The node first: its launch file checks its own arguments.
    if boolean('node', value['node']):
        # A group, because the arguments of an included file hold in this one as well.
        actions.append(GroupAction([IncludeLaunchDescription(
            PythonLaunchDescriptionSource(
                os.path.join(share, 'launch', 'anomaly_seg.launch.py')),
            launch_arguments=[('model', value['model']), ('image', value['image']),
                              ('use_sim_time', 'true'), ('rviz', 'false'),
                              ('foxglove', 'false')])]))
    for argument, package, arguments, remappings in (
            ('rviz', 'rviz2', ['-d', os.path.join(share, 'config', 'anomaly_seg.rviz')],
             [(CAMERA, value['image'].removesuffix('/compressed'))]),
            ('foxglove', 'foxglove_bridge', [], [])):
        if boolean(argument, value[argument]):
            get_package_prefix(package)  # raises where it is not installed
            actions.append(Node(package=package, executable=package, name=package,
                                arguments=arguments, remappings=remappings))
    delay = value['delay'] or ('3' if boolean('node', value['node']) else '0')
    # A result bag has the camera's image where the node takes it, the viewers look for a camera.
    remap = [] if boolean('node', value['node']) else [
        '--remap', f'/anomaly_seg/input/image:={value["image"]}']
    return [*actions, ExecuteProcess(
        cmd=['ros2', 'bag', 'play', value['bag'], '--clock', '--rate', value['rate'],
             '--delay', delay, *remap], output='screen')]
