"""Checks of csrc that take long run where csrc changed: a stamp below build/ says when they passed.

A clone without a stamp whose csrc is as committed has nothing to check: CI did. CI=true runs all.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAMPS = ROOT / "build/stamps"


def digest(*tests: str) -> str:
    """Of csrc, the build's list of sources and the tests, paths below the root."""
    files = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()]
    files += [ROOT / "CMakeLists.txt", *(ROOT / name for name in tests)]
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return whole.hexdigest()


def committed() -> bool:
    """Whether csrc is what the last commit says; False outside of git."""
    git = ["git", "-C", str(ROOT), "status", "--porcelain", "--", "csrc", "CMakeLists.txt"]
    try:
        done = subprocess.run(git, capture_output=True, text=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0 and not done.stdout


@contextmanager
def where_csrc_changed(name: str, *tests: str) -> Iterator[None]:
    """Skip the body if it passed on these files; stamp them where it passes."""
    stamp, now = STAMPS / name, digest(*tests)
    if os.environ.get("CI") != "true":
        if not stamp.exists() and committed():
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(now)
        if stamp.exists() and stamp.read_text() == now:
            pytest.skip("csrc is as committed, or as it was when this passed; CI=true runs it")
    yield
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(now)
