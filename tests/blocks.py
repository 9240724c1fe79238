"""The fenced blocks of a page."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    """Those in one language, in order."""
    return [text for name, text in _FENCE.findall((ROOT / page).read_text()) if name == language]
