# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def real_data() -> Path:
    """Folder of the real weights and benchmark images; skips where they are absent."""
    folder = Path(os.environ.get('ANOMALY_SEG_DATA', ROOT.parent / 'shared' / 'data'))
    if not folder.is_dir():
        pytest.skip(f'no real data: {folder} is not a folder; set ANOMALY_SEG_DATA')
    return folder
