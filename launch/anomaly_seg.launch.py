# SPDX-License-Identifier: Apache-2.0
"""
Start the node, and on request rviz2 or the Foxglove bridge.

    ros2 launch anomaly_seg_ros anomaly_seg.launch.py model:=erfnet.onnx image:=/front/image_raw
"""

import os

from ament_index_python.packages import get_package_prefix, get_package_share_directory
from anomaly_seg_ros.ros.launching import boolean
from anomaly_seg_ros.ros.transport import profile_environment
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

# Arguments that become parameters of the node where they are given; name -> description.
PARAMETERS = {
    'model': 'Model file (.onnx); by default the bundled one, which knows only the synthetic '
             'world.',
    'image_transport': 'raw or compressed.',
    'autostart': 'Whether to configure and activate without a lifecycle manager.',
    'use_sim_time': 'Whether to take the time from /clock.',
}
# name -> default, description.
ARGUMENTS = {
    'image': ('/camera/image_raw', 'Topic of the camera image; of a compressed one the whole '
                                   'name, which ends in /compressed.'),
    'camera_info': ('/camera/camera_info', 'Topic of its CameraInfo.'),
    'namespace': ('', 'Namespace of the node.'),
    'name': ('anomaly_seg', 'Name of the node, and so of its topics.'),
    'log_level': ('info', 'Log level of the node.'),
    'respawn': ('false', 'Start the node again one second after it has ended, whatever the '
                         'reason; for vehicles.'),
    'rviz': ('false', 'Start rviz2 with config/anomaly_seg.rviz.'),
    'foxglove': ('false', 'Start foxglove_bridge; open config/foxglove_layout.json in the app.'),
}


def generate_launch_description() -> LaunchDescription:
    """Return what ``ros2 launch`` carries out."""
    config = os.path.join(get_package_share_directory('anomaly_seg_ros'), 'config')
    actions: list[LaunchDescriptionEntity] = [
        DeclareLaunchArgument(
            'params_file', default_value=os.path.join(config, 'anomaly_seg.yaml'),
            description='Parameter file; the arguments here go before it.'),
        *(DeclareLaunchArgument(name, default_value='', description=description)
          for name, description in PARAMETERS.items()),
        *(DeclareLaunchArgument(name, default_value=default, description=description)
          for name, (default, description) in ARGUMENTS.items())]
    # Fast DDS loses frames of several megabytes unless told otherwise.
    variables = profile_environment(os.environ, os.path.join(config, 'fastdds.xml'))
    actions += [SetEnvironmentVariable(*variable) for variable in variables.items()]
    return LaunchDescription([*actions, OpaqueFunction(function=start)])


def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """
    Return the node and the viewers; all arguments are checked before any of them starts.

    A launch that fails with a process on its way leaves that process running.
    """
    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    config = os.path.join(get_package_share_directory('anomaly_seg_ros'), 'config')
    # An argument that was not given leaves the parameter file its say.
    given = {name: value(name) for name in PARAMETERS if value(name)}
    parameters = {name: text if name in ('model', 'image_transport') else boolean(name, text)
                  for name, text in given.items()}
    # launch_ros would only warn, and the node start on its defaults.
    if not os.path.isfile(value('params_file')):
        raise ValueError(f'launch argument params_file: no file {value("params_file")!r}')
    actions: list[LaunchDescriptionEntity] = [Node(
        package='anomaly_seg_ros', executable='anomaly_seg', name=value('name'),
        namespace=value('namespace'), output='screen', emulate_tty=True,
        respawn=boolean('respawn', value('respawn')), respawn_delay=1.0,
        ros_arguments=['--log-level', value('log_level')],
        parameters=[value('params_file'), parameters],
        remappings=[('~/input/image', value('image')),
                    ('~/input/camera_info', value('camera_info'))])]
    # What config/anomaly_seg.rviz shows: the camera, of a JPEG stream what the driver publishes
    # beside it, and the node's outputs under its default name.
    node = '/'.join(['', *filter(None, (value('namespace').strip('/'), value('name')))])
    shown = [('/camera/image_raw', value('image').removesuffix('/compressed')),
             *((f'/anomaly_seg/output/{output}', f'{node}/output/{output}')
               for output in ('overlay', 'anomaly_u8', 'obstacle_mask'))]
    for argument, package, arguments, remappings in (
            ('rviz', 'rviz2', ['-d', os.path.join(config, 'anomaly_seg.rviz')], shown),
            ('foxglove', 'foxglove_bridge', [], [])):
        if boolean(argument, value(argument)):
            get_package_prefix(package)  # raises where it is not installed
            actions.append(Node(package=package, executable=package, name=package,
                                arguments=arguments, remappings=remappings))
    return actions
