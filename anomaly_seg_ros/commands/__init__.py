# SPDX-License-Identifier: Apache-2.0
"""The commands of ``anomaly-seg``, each a call into the core; ``cli`` puts them together."""
