"""Where things derived from data sets go that cannot be written beside them."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """``$XDG_CACHE_HOME/gppf-ds``, without the variable ``~/.cache/gppf-ds``; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gppf-ds"
