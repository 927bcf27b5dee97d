"""The Chromium that the report's tests open: found in the same places as by tools/install-browser.sh."""

import os
import shutil
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # swiftshader: WebGL on the processor, for the 3-D figures


def find_browser() -> str:
    """Path of a Chromium; an error that names the cure where there is none."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    for cache in (os.environ.get("PLAYWRIGHT_BROWSERS_PATH"), Path.home() / ".cache" / "ms-playwright"):
        for path in sorted(Path(cache).glob("chromium-*/chrome-linux*/chrome")) if cache else []:
            return str(path)
    raise FileNotFoundError("There is no Chromium for the browser tests. Install one: sh tools/install-browser.sh")
