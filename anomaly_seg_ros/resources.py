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

    Looked for in the source checkout (editable installs), then in the ``share`` of the folder or
    prefix that the code is installed in, of each ROS prefix and of the Python environment.

    Raises
    ------
    UserError
        If it is in none of them; lists where it was looked for.

    """
    share = Path('share') / PACKAGE
    code = Path(__file__).resolve()
    checkout = code.parents[1]
    folders = [checkout] if (checkout / 'package.xml').is_file() else []
    # Of pip install: --target FOLDER; --prefix and --user, code in lib/pythonX.Y/site-packages.
    folders += [parent / share for parent in code.parents[1:5:3]]
    folders += [Path(prefix) / share
                for prefix in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if prefix]
    folders += [Path(sysconfig.get_path('data')) / share]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise UserError(f'{name}: not found in {", ".join(map(str, folders))}. Install '
                    f'{PACKAGE} again; the file is part of it.')
