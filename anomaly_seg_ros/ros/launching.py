# SPDX-License-Identifier: Apache-2.0
"""What the launch files share; needs neither launch nor rclpy."""


def boolean(name: str, text: str) -> bool:
    """
    Read a launch argument that is true or false.

    Raises
    ------
    ValueError
        If it is something else.

    """
    if text.lower() not in ('true', 'false'):
        raise ValueError(f'launch argument {name} must be true or false, got {text!r}')
    return text.lower() == 'true'
