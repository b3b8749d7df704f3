# SPDX-License-Identifier: Apache-2.0
"""The one exception that the command line and the node show to people without a traceback."""


class UserError(RuntimeError):
    """
    Something the user can mend: a file, a setting, a device.

    The message names the file or setting, what was expected, what came and what to do.
    """
