# SPDX-License-Identifier: Apache-2.0
"""Headless Chromium for the tests that look at a page."""

import json
from pathlib import Path
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

_FLAGS = (
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
    '--disable-background-networking', '--disable-component-update', '--disable-sync',
    '--hide-scrollbars', '--allow-file-access-from-files', '--disable-dev-shm-usage')

# A frame of the asked width around the page: the page itself may run no script.
_RULER = """<!DOCTYPE html><body style="margin:0">
<iframe id="page" src="{page}" style="width:{width}px;height:900px;border:0"></iframe>
<pre id="out"></pre>
<script>
document.getElementById('page').onload = () => {{
  const page = document.getElementById('page').contentDocument;
  const images = [...page.images];
  document.getElementById('out').textContent = 'MEASURED' + JSON.stringify({{
    width: page.documentElement.scrollWidth,
    images: images.length,
    broken: images.filter(i => !i.complete || !i.naturalWidth || !i.clientWidth).length,
    small_text: [...page.querySelectorAll('p,td,th,li,figcaption')].filter(
      e => parseFloat(getComputedStyle(e).fontSize) < 12).length}}) + 'END';
}};
</script>"""


class Browser:
    """One page, seen in Chromium."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.program = next((path for path in map(shutil.which, (
            'chromium', 'chromium-browser', 'google-chrome')) if path), None)
        if self.program is None:
            pytest.skip('no Chromium here: apt-get install chromium')

    def _run(self, *arguments: str) -> str:
        profile = self.folder / 'profile'
        command = [self.program, *_FLAGS, f'--user-data-dir={profile}', *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    def measure(self, width: int) -> dict[str, int]:
        """Return the page's scroll width, images and broken images in a window of a width."""
        ruler = self.folder / f'ruler_{width}.html'
        ruler.write_text(_RULER.format(page=self.page.as_uri(), width=width))
        text = self._run('--dump-dom', '--virtual-time-budget=10000', ruler.as_uri())
        return dict(json.loads(re.search('MEASURED(.*?)END', text.split('<pre')[1]).group(1)))

    def screenshot(self, width: int, height: int) -> np.ndarray:
        """Return what a window shows, uint8 (H, W, 3) RGB."""
        path = self.folder / f'{width}.png'
        self._run(f'--window-size={width},{height}', f'--screenshot={path}', self.page.as_uri())
        return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)

    def pdf(self) -> bytes:
        """Return the printed page."""
        path = self.folder / 'page.pdf'
        self._run('--no-pdf-header-footer', f'--print-to-pdf={path}', self.page.as_uri())
        return path.read_bytes()
