from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest

from .recorded import Record, Recorded


@pytest.fixture
def recorded(start: Callable[..., Any], tmp_path: Path) -> Record:
    """Start a server with ``--pcap`` and these words."""
    def started(*words: str, **keywords: Any) -> Recorded:
        path = tmp_path / "recording.pcap"
        return Recorded(start("--pcap", str(path), "--workers", "1", *words, **keywords), path)

    return started
