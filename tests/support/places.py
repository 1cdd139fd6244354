"""Directories that other users can reach.

pytest keeps its temporary directories closed to others and closes them again whenever another
session starts, so a test that changes its user works elsewhere.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support import mounts


@contextlib.contextmanager
def open_directory() -> Iterator[Path]:
    """A new directory of mode 0755 on an open path; unmounted and removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="unionfs2-test-", dir="/var/tmp")).resolve()
    path.chmod(0o755)
    try:
        yield path
    finally:
        mounts.detach(path)
        shutil.rmtree(path)
