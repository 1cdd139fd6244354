"""What a start loads: the budget of time and memory, held by the list of modules."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import pytest

from tests.e2e.conftest import REPOSITORY, Site

pytestmark = pytest.mark.needs("root", "fuse")

#: Loaded neither by the command that starts a server nor by the server, on the way to a mount that
#: answers. Each costs more than it is worth there.
NEVER: Final = frozenset(
    [
        "argparse",
        "ast",
        "asyncio",
        "cffi",
        "concurrent",
        "copy",
        "csv",
        "dataclasses",
        "datetime",
        "decimal",
        "difflib",
        "dis",
        "email",
        "fnmatch",
        "glob",
        "hashlib",
        "http",
        "importlib",
        "inspect",
        "ipaddress",
        "json",
        "linecache",
        "logging",
        "ntpath",
        "pathlib",
        "pickle",
        "pyfuse3",
        "random",
        "rich",
        "selectors",
        "shutil",
        "socket",
        "ssl",
        "string",
        "subprocess",
        "tarfile",
        "tempfile",
        "textwrap",
        "tokenize",
        "traceback",
        "trio",
        "unittest",
        "urllib",
        "uuid",
        "xattr",
        "zipfile",
        "zlib",
        "zstandard",
        "unionfs2.driver",
        "unionfs2.fs_ops",
        "unionfs2.layers",
        "unionfs2.logs",
        "unionfs2.native_overlay",
    ]
)
#: Left to the server.
NOT_IN_THE_STARTER: Final = frozenset(
    [
        "mmap",
        "queue",
        "resource",
        "unionfs2.devfuse",
        "unionfs2.layercheck",
        "unionfs2.syscalls",
        "unionfs2.union",
    ]
)

#: The command, which has both of its processes tell what they have loaded by their end.
WATCH: Final = """
import os, sys

before = set(sys.modules)
told = sys.argv.pop(1)
from unionfs2.cli import fuse

os_exit = os._exit
starter = os.getpid()

def leave(status):
    with open(f"{told}/{'starter' if os.getpid() == starter else 'server'}", "w") as file:
        file.write("\\n".join(set(sys.modules) - before))
    os_exit(status)

os._exit = leave
fuse.main()
"""


@pytest.mark.parametrize("limits", ["", ",size=1g"])
def test_what_a_mount_does_not_use_is_not_loaded(site: Site, limits: str) -> None:
    subprocess.run(
        [
            *(sys.executable, "-S", "-W", "error", "-c", WATCH, site.root),
            *("-o", f"{site.options},transport=devfuse{limits}", site.mountpoint),
        ],
        check=True,
        env={**site.environment, "PYTHONPATH": str(REPOSITORY)},
    )
    (site.mountpoint / "new").write_text("1")
    assert sorted(path.name for path in site.mountpoint.iterdir()) == ["new", "one", "two"]
    assert site.main("umount", site.mountpoint).returncode == 0  # and the server has ended
    loaded = {who: set((site.root / who).read_text().split()) for who in ("starter", "server")}
    assert "unionfs2.devfuse.server" in loaded["server"]
    assert sorted(loaded["server"] & NEVER) == []
    assert sorted(loaded["starter"] & (NEVER | NOT_IN_THE_STARTER)) == []
