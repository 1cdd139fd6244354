"""A project below a closed directory, reached by an ordinary user in the tests' own namespace."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools import reachable


@pytest.fixture
def closed() -> Iterator[Path]:
    """A closed directory with a project in it; not below pytest's own, which is closed itself."""
    with tempfile.TemporaryDirectory(prefix="unionfs2-test-") as name:
        Path(name).chmod(0o755)
        closed = Path(name) / "closed"
        project = closed / "home" / "project"
        project.mkdir(parents=True)
        for directory in (project, project.parent):
            directory.chmod(0o755)
        (project / "file").write_text("reached")
        closed.chmod(0o700)
        yield closed


def test_the_closed_directory_is_found(closed: Path) -> None:
    assert reachable.closed_directory(closed / "home" / "project") == closed
    closed.chmod(0o711)
    assert reachable.closed_directory(closed / "home" / "project") is None


@pytest.mark.needs("root")
def test_an_ordinary_user_reaches_the_project(closed: Path) -> None:
    project = closed / "home" / "project"
    user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "cat"]
    command = [*user, str(project / "file")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1
    done = subprocess.run(
        [*reachable.prefix(project), *command], check=True, capture_output=True, text=True
    )
    assert done.stdout == "reached"
    assert [path.name for path in closed.iterdir()] == ["home"]


@pytest.mark.needs("root")
def test_nothing_is_done_where_nothing_is_needed(closed: Path) -> None:
    closed.chmod(0o755)
    assert reachable.prefix(closed / "home" / "project") == []
