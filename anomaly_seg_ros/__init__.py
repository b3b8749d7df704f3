# SPDX-License-Identifier: Apache-2.0
"""What in this camera image does my segmentation network not know."""

__version__ = '0.1.0'
