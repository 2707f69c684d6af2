"""A headless browser: what a page looks like, in light and dark, on a screen and on paper."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
TIMEOUT_SECONDS = 120
# Reports, once everything is laid out, how wide the page became; it is put into a copy, the page has no scripts.
MEASURE = """<script>addEventListener("load", () => {
  const page = document.documentElement;
  page.dataset.widths = page.scrollWidth + "/" + page.clientWidth;
});</script>"""


class Browser:
    """Runs one process for each question; nothing is kept between them."""

    def __init__(self, program: str, work: Path) -> None:
        self._program = program
        self._work = work

    @classmethod
    def find(cls, work: Path) -> "Browser":
        """The browser of this machine; the test is skipped where there is none."""
        program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
        if program is None:
            pytest.skip("no headless browser (Debian: apt install chromium-headless-shell)")
        return cls(program, work)

    def screenshot(self, page: Path, width: int, height: int, *, dark: bool = False) -> np.ndarray[Any, Any]:
        """The page's pixels as (height, width, red green blue)."""
        path = self._work / "screenshot.png"
        self._run(page, f"--window-size={width},{height}", f"--screenshot={path}", dark=dark)
        return np.asarray(Image.open(path).convert("RGB")).astype(int)

    def widths(self, page: Path, width: int) -> tuple[int, int]:
        """How wide the laid-out page is, and how wide the window is, in pixels."""
        copy = self._work / "measured.html"
        copy.write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
        shown = self._run(copy, f"--window-size={width},900", "--dump-dom")
        found = re.search(r'data-widths="(\d+)/(\d+)"', shown)
        assert found, shown[:500]
        return int(found[1]), int(found[2])

    def paper_pages(self, page: Path) -> int:
        """How many sheets the printed page has."""
        path = self._work / "printed.pdf"
        self._run(page, f"--print-to-pdf={path}", "--no-pdf-header-footer")
        return len(re.findall(rb"/Type\s*/Page\b(?!s)", path.read_bytes()))

    def _run(self, page: Path, *options: str, dark: bool = False) -> str:
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", scheme)
        profile = f"--user-data-dir={self._work / 'profile'}"
        command = [self._program, *fixed, profile, *options, page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        assert done.returncode == 0, done.stderr
        return done.stdout
