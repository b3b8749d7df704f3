# SPDX-License-Identifier: Apache-2.0
"""The worked example of docs/metrics.md gives what the page says."""

import doctest
from pathlib import Path


def test_worked_example():
    page = Path(__file__).resolve().parent.parent / 'docs' / 'metrics.md'
    failed, run = doctest.testfile(str(page), module_relative=False)
    assert failed == 0 and run > 25
