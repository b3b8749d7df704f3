# SPDX-License-Identifier: Apache-2.0
"""
Play a bag in rviz2 or Foxglove: a result bag by itself, or any bag through the live node.

    ros2 launch anomaly_seg_ros replay.launch.py bag:=results/result_bag
    ros2 launch anomaly_seg_ros replay.launch.py bag:=drive.mcap node:=true model:=erfnet.onnx
"""

import os

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument, ExecuteProcess, GroupAction, IncludeLaunchDescription,
    SetEnvironmentVariable)
from launch.conditions import IfCondition
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

# name -> default, description; None: must be given.
ARGUMENTS = {
    'bag': (None, 'The bag: folder or file.'),
    'rate': ('1.0', 'How many times as fast as recorded.'),
    'node': ('false', 'Run the node on the bag. A result bag holds its outputs already.'),
    'model': ('', 'Model file for the node; by default the bundled one.'),
    'image': ('/camera/image_raw', 'Topic of the camera image in the bag.'),
    'rviz': ('true', 'Start rviz2 with config/anomaly_seg.rviz.'),
    'foxglove': ('false', 'Start foxglove_bridge; open config/foxglove_layout.json in the app.'),
}
PROFILE_VARIABLES = ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE')


def generate_launch_description() -> LaunchDescription:
    """Return what ``ros2 launch`` carries out."""
    share = get_package_share_directory('anomaly_seg_ros')
    config = os.path.join(share, 'config')
    value = {name: LaunchConfiguration(name) for name in ARGUMENTS}
    actions = [DeclareLaunchArgument(name, default_value=default, description=description)
               for name, (default, description) in ARGUMENTS.items()]
    if not any(name in os.environ for name in PROFILE_VARIABLES):
        actions += [SetEnvironmentVariable(name, os.path.join(config, 'fastdds.xml'))
                    for name in PROFILE_VARIABLES]
    actions += [
        Node(package='rviz2', executable='rviz2', name='rviz2',
             arguments=['-d', os.path.join(config, 'anomaly_seg.rviz')],
             condition=IfCondition(value['rviz'])),
        Node(package='foxglove_bridge', executable='foxglove_bridge', name='foxglove_bridge',
             condition=IfCondition(value['foxglove'])),
        # A group, because the arguments of an included file hold in this one as well.
        GroupAction([IncludeLaunchDescription(
            PythonLaunchDescriptionSource(
                os.path.join(share, 'launch', 'anomaly_seg.launch.py')),
            launch_arguments=[('model', value['model']), ('image', value['image']),
                              ('use_sim_time', 'true'), ('rviz', 'false'),
                              ('foxglove', 'false')])],
            condition=IfCondition(value['node'])),
        ExecuteProcess(cmd=['ros2', 'bag', 'play', value['bag'], '--clock',
                            '--rate', value['rate']], output='screen')]
    return LaunchDescription(actions)
