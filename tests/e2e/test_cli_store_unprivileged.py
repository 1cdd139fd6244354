"""The store of an ordinary user: FUSE through fusermount3, and both backends in a namespace."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.e2e.shelf import BASE, Done, Shelf, shelf_of, tar_of
from tests.support import fusedev, mounts

pytestmark = pytest.mark.needs("root", "private-fuse")

USER = 65534

SESSION = """
unionfs2 layer create --id base
unionfs2 layer apply base base.tar
unionfs2 layer create --id box --parent base --writable
cd "$(unionfs2 layer mount box)"
rm etc/motd; rm -r usr; mkdir usr; echo box > etc/hostname
cd "$OLDPWD"
unionfs2 layer umount box
unionfs2 layer changes box
unionfs2 layer diff box -o changes.tar
unionfs2 layer create --id copy --parent base --writable
unionfs2 layer apply copy changes.tar
unionfs2 layer changes copy
unionfs2 check
unionfs2 layer rm box copy base
"""
CHANGES = ["C /etc", "C /etc/hostname", "D /etc/motd", "C /usr", "D /usr/tool"]


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    with shelf_of(None) as shelf:
        (shelf.root / "base.tar").write_bytes(tar_of(BASE, owner=USER))
        for path in (shelf.root, *shelf.root.rglob("*")):
            os.chown(path, USER, USER, follow_symlinks=False)
        yield shelf


def run(shelf: Shelf, wrapped: list[str]) -> Done:
    done = subprocess.run(
        wrapped,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=shelf.environment,
        cwd=shelf.root,
        timeout=60,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr.decode())


def check_session(shelf: Shelf, done: Done) -> None:
    assert done.status == 0, done.err
    lines = done.text.splitlines()
    assert lines[0] == "base"
    assert lines.count("C /etc/hostname") == 2
    start = lines.index("C /etc")
    assert lines[start : start + 5] == CHANGES
    assert os.listdir(shelf.home / "l") == []
    assert mounts.below(shelf.root) == []


def test_an_ordinary_user(shelf: Shelf) -> None:
    done = run(shelf, fusedev.as_user(["sh", "-ec", SESSION], uid=USER, gid=USER))
    check_session(shelf, done)


def test_files_of_others(shelf: Shelf) -> None:
    (shelf.root / "base.tar").write_bytes(tar_of(BASE))
    script = "unionfs2 layer create --id base; unionfs2 layer apply base base.tar"
    done = run(shelf, fusedev.as_user(["sh", "-ec", script], uid=USER, gid=USER))
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert "ignore_chown_errors" in done.err
    assert shelf.leftovers() == []
    script = "unionfs2 --storage-opt ignore_chown_errors=true layer apply base base.tar"
    done = run(shelf, fusedev.as_user(["sh", "-ec", script], uid=USER, gid=USER))
    assert (done.status, done.err) == (0, "")


@pytest.mark.needs("userns-overlay", "overlay")
@pytest.mark.parametrize("backend", ["fuse", "native"])
def test_root_of_a_user_namespace(shelf: Shelf, backend: str) -> None:
    script = SESSION.replace("unionfs2 ", f"unionfs2 --backend {backend} ")
    # Root there owns what the user owns here.
    (shelf.root / "base.tar").write_bytes(tar_of(BASE))
    done = run(shelf, fusedev.in_user_namespace(["sh", "-ec", script], uid=USER, gid=USER))
    check_session(shelf, done)


def test_the_store_of_a_user_is_at_home(shelf: Shelf) -> None:
    script = "unset UNIONFS2_ROOT; export XDG_DATA_HOME=$PWD/data; unionfs2 layer create --id mine"
    done = run(shelf, fusedev.as_user(["sh", "-ec", script], uid=USER, gid=USER))
    assert (done.text, done.err) == ("mine\n", "")
    assert (shelf.root / "data" / "unionfs2" / "mine" / "diff").is_dir()
