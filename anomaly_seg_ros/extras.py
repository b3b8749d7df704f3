# SPDX-License-Identifier: Apache-2.0
"""Libraries that only some uses need: the extras of setup.py."""

from importlib.util import find_spec

from anomaly_seg_ros.errors import UserError


def how_to_install(extra: str) -> str:
    """Return what to do to get an extra; the package itself is not on PyPI."""
    where = f'pip install ".[{extra}]" in the checkout of anomaly_seg_ros'
    return f'source a ROS 2, or run {where}' if extra == 'ros' else f'run {where}'


def require(extra: str, *modules: str, otherwise: str = '') -> None:
    """
    Make sure that modules of an extra are installed, without importing them.

    Raises
    ------
    UserError
        If one is not; says how to get it and, where given, what to do ``otherwise``.

    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise UserError(f'this needs {", ".join(missing)}: {how_to_install(extra)}'
                        + (f', or {otherwise}' if otherwise else ''))
