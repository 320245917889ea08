"""A real browser for the tests of pages; a machine without one skips them and says so."""

from __future__ import annotations

import os
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("SANDWICH_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
REASON = "no chromium on this machine (Debian: apt install chromium; or name one in SANDWICH_CHROMIUM)"
