# SPDX-License-Identifier: Apache-2.0
"""Find the files that are installed beside the code: models, launch and configuration files."""

import os
from pathlib import Path
import sysconfig

from anomaly_seg_ros.errors import UserError

PACKAGE = 'anomaly_seg_ros'


def resource(name: str) -> Path:
    """
    Return the path of a shipped file such as ``models/demo.onnx`` or ``config/fastdds.xml``.

    Looked for in the source checkout (editable installs), then in each ROS prefix, then in the
    Python environment's ``share``.

    Raises
    ------
    UserError
        If it is in none of them; lists where it was looked for.

    """
    share = Path('share') / PACKAGE
    checkout = Path(__file__).resolve().parent.parent
    folders = [checkout] if (checkout / 'package.xml').is_file() else []
    folders += [Path(prefix) / share
                for prefix in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if prefix]
    folders += [Path(sysconfig.get_path('data')) / share]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise UserError(f'{name}: not found in {", ".join(map(str, folders))}. Install '
                    f'{PACKAGE} again; the file is part of it.')
