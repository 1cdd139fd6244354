"""The record of an original stream: overwritten files, damage, changed layers; failing disks."""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from pathlib import Path

import pytest

from tests.support.archives import TRUSTED, extract, extract_recorded, packed, rebuilt
from tests.support.faults import inject
from tests.support.places import open_directory
from tests.support.tarmake import archive, entry, pax
from tests.support.tree import File, build
from unionfs2.archive.digest import THREAD_NAME, HashingReader, StreamHash, chain_id, digest_of
from unionfs2.archive.read import unpack
from unionfs2.archive.writer import TarWriter
from unionfs2.errors import ArchiveError
from unionfs2.storemodel import Digest
from unionfs2.whiteout import Dialect

pytestmark = pytest.mark.needs("root", "mknod", "trusted-xattr", "user-xattr")

DIR, HARD, SYM = b"5", b"1", b"2"
BIG = os.urandom(3 << 20)


def _names(*parts: bytes) -> bytes:
    return archive(*parts) + bytes(3000)


STREAMS = {
    "a file again": _names(entry(b"f", b"one"), entry(b"f", b"two"), entry(b"f", b"three")),
    "a large file again": _names(entry(b"f", BIG), entry(b"f", b"two")),
    "a file with a second name": _names(
        entry(b"f", b"one"), entry(b"g", b"", HARD, link=b"f"), entry(b"f", b"two")
    ),
    "a second name over a file": _names(
        entry(b"f", b"one"), entry(b"g", b"two"), entry(b"g", b"", HARD, link=b"f")
    ),
    "a directory that turns into a file": _names(
        entry(b"d/a", b"1"), entry(b"d/e/b", b"2"), entry(b"d/e/b", b"3"), entry(b"d", b"file")
    ),
    "a file that turns into a link": _names(
        entry(b"f", b"1"), entry(b"f", b"", SYM, link=b"x"), entry(b"f", b"2")
    ),
    "through a link": _names(
        entry(b"l", b"", SYM, link=b"d/e"), entry(b"l/f", b"1"), entry(b"d/e/g", b"2")
    ),
    "deletions with content": _names(entry(b".wh.x", b"why"), entry(b".wh..wh.plnk/1", b"data")),
    "no file at all": archive(),
    "many of one kind": _names(*[entry(b"%d" % n, b"%d" % n) for n in range(2000)]),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_stream_is_made_again(tmp_path: Path, name: str) -> None:
    data = STREAMS[name]
    done = extract_recorded(data, tmp_path / "x", tmp_path / "record")
    again = rebuilt(tmp_path / "x", tmp_path / "record")
    assert again == data
    assert digest_of(again) == done.diff_id


def _recorded(tmp_path: Path) -> Path:
    data = archive(entry(b"a/f", b"content"), entry(b"g", b"x" * 5000), entry(b"a/f", b"new"))
    extract_recorded(data, tmp_path / "x", tmp_path / "record")
    return tmp_path / "record" / "tar-split"


def test_a_changed_layer_is_named(tmp_path: Path) -> None:
    _recorded(tmp_path)
    original = rebuilt(tmp_path / "x", tmp_path / "record")
    (tmp_path / "x" / "g").write_bytes(b"y" * 5000)
    assert rebuilt(tmp_path / "x", tmp_path / "record") != original  # its digest tells
    for change in ("shorter", "gone", "link", "directory"):
        (tmp_path / "x" / "g").unlink()
        if change == "shorter":
            (tmp_path / "x" / "g").write_bytes(b"y")
        elif change == "link":
            (tmp_path / "x" / "g").symlink_to("/etc/passwd")
        elif change == "directory":
            (tmp_path / "x" / "g").mkdir()
        with pytest.raises(ArchiveError, match='"g" is not what the original stream held'):
            rebuilt(tmp_path / "x", tmp_path / "record")
        if change == "gone":
            (tmp_path / "x" / "g").touch()
    shutil.rmtree(tmp_path / "x" / "a")
    os.symlink("/etc", tmp_path / "x" / "a")
    with pytest.raises(ArchiveError, match="original stream held"):
        rebuilt(tmp_path / "x", tmp_path / "record")


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    path = _recorded(tmp_path)
    whole = path.read_bytes()
    original = rebuilt(tmp_path / "x", tmp_path / "record")
    for cut in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArchiveError, match=r"tar-split\) is damaged"):
            rebuilt(tmp_path / "x", tmp_path / "record")
    refused = 0
    for at in range(len(whole)):
        wrong = bytearray(whole)
        wrong[at] ^= 0x41
        path.write_bytes(wrong)
        try:
            again = rebuilt(tmp_path / "x", tmp_path / "record")
        except ArchiveError:
            refused += 1
        else:
            # What is not noticed here, the digest tells its caller.
            refused += digest_of(again) != digest_of(original)
    assert refused > 0.9 * len(whole)


def test_the_record_is_small(tmp_path: Path) -> None:
    extract_recorded(STREAMS["many of one kind"], tmp_path / "x", tmp_path / "record")
    assert (tmp_path / "record" / "tar-split").stat().st_size < 100_000


# --- failing disks --------------------------------------------------------------------------------


def _hashing() -> list[threading.Thread]:
    """Threads that hash; those of other tests are none of ours."""
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_failing_disk_is_an_oserror_and_nothing_stays_open(tmp_path: Path) -> None:
    data = archive(
        entry(b"d/", b"", DIR, mode=0o700),
        pax({b"SCHILY.xattr.user.k": b"v"}),
        entry(b"d/f", b"1"),
        entry(b"d/g", b"", HARD, link=b"d/f"),
        entry(b"d/f", b"2"),
        entry(b"e/l", b"", SYM, link=b"x"),
        entry(b"e/.wh..wh..opq"),
        entry(b".wh.x"),
    )
    before = _open_files()
    count = 0
    errors: set[int | None] = set()
    for n in range(1, 200):
        with inject(fail_at=n, error=errno.ENOSPC) as faults:
            try:
                extract_recorded(data, tmp_path / f"x{n}", tmp_path / f"record{n}")
            except (OSError, ArchiveError) as exc:
                errors.add(exc.errno)
        assert _open_files() == before
        if not faults.fired:
            break
        count += 1
    assert count > 30
    assert errors == {errno.ENOSPC}
    assert not _hashing()


class _Breaks(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 1 << 20:
            raise OSError(errno.EIO, "the network is down")
        return super().read(size)


def test_a_stream_that_breaks_is_not_blamed_on_the_member(tmp_path: Path) -> None:
    data = archive(entry(b"f", BIG))
    (tmp_path / "x").mkdir()
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    try:
        with pytest.raises(ArchiveError, match="cannot be read: the network is down") as caught:
            unpack(_Breaks(data), fd, dialect=TRUSTED)
        assert caught.value.errno == errno.EIO
    finally:
        os.close(fd)
    assert not _hashing()


def test_a_file_that_shrinks_while_it_is_packed(tmp_path: Path) -> None:
    class Shrunk:
        path = b"f"

        def __init__(self) -> None:
            build(tmp_path, {"f": File("x" * 5000)})
            self.st = os.stat(tmp_path / "f")
            os.truncate(tmp_path / "f", 100)

        def readlink(self) -> bytes:
            raise AssertionError

        def xattrs(self) -> dict[bytes, bytes]:
            return {}

        def open(self) -> int:
            return os.open(tmp_path / "f", os.O_RDONLY)

    before = _open_files()
    with (
        TarWriter(io.BytesIO()) as writer,
        pytest.raises(ArchiveError, match='"f" became shorter while it was read'),
    ):
        writer.add(Shrunk())
    assert _open_files() == before


def test_progress_and_digest_of_a_large_stream(tmp_path: Path) -> None:
    data = archive(entry(b"f", BIG))
    steps: list[int] = []
    done = extract(data, tmp_path / "x", progress=steps.append)
    assert steps == sorted(steps)
    assert steps[-1] == len(data)
    assert done.diff_id == digest_of(data)
    assert packed(tmp_path / "x").find(BIG) > 0


# --- without privilege ----------------------------------------------------------------------------


def _as_user(action: str, directory: Path) -> str:
    """Run unpack() as an ordinary user in a child; what it said."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if not pid:  # the child only reports
        os.close(read_fd)
        said = "died"
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            said = _try_as_user(action, directory)
        finally:
            os.write(write_fd, said.encode())
            os._exit(0)
    os.close(write_fd)
    with open(read_fd, encoding="utf-8") as stream:
        said = stream.read()
    os.waitpid(pid, 0)
    return said


def _try_as_user(action: str, directory: Path) -> str:
    parts = {
        "own": entry(b"d/f", b"1", uid=65534, gid=65534) + entry(b"d", b"", DIR, mode=0o500),
        "foreign": entry(b"f", b"1", uid=5, gid=5),
        "device": entry(b"n", b"", b"3", major=1, minor=3),
        "deletion": entry(b".wh.x") + entry(b"o/.wh..wh..opq"),
        "capability": pax({b"SCHILY.xattr.security.capability": bytes(20)}) + entry(b"f"),
    }
    name, _, lenient = action.partition("+")
    try:
        extract(
            archive(parts[name]),
            directory / "x",
            dialect=Dialect(userxattr=True),
            ignore_chown_errors=bool(lenient),
        )
    except (ArchiveError, OSError) as exc:
        return f"{exc}"
    return "done"


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("own+x", "done"),
        ("foreign", "owner 5:5 cannot be set"),
        ("foreign+x", "done"),
        ("device+x", "making one is not permitted"),
        ("deletion+x", "done"),
        ("capability+x", "done"),
    ],
)
def test_an_ordinary_user(action: str, said: str) -> None:
    with open_directory() as directory:
        directory.chmod(0o777)
        assert said in _as_user(action, directory)


# --- digests --------------------------------------------------------------------------------------


def test_digests() -> None:
    a, b = digest_of(b"a"), digest_of(b"b")
    assert a == "sha256:ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert chain_id([a]) == a
    assert chain_id([a, b]) == digest_of(f"{a} {b}".encode())
    assert chain_id([a, b, a]) == digest_of(f"{chain_id([a, b])} {a}".encode())
    with pytest.raises(ValueError, match="at least one"):
        chain_id([])
    reader = HashingReader(io.BytesIO(b"ab"))
    assert (reader.read(1), reader.read()) == (b"a", b"b")
    assert (reader.size, reader.digest()) == (2, digest_of(b"ab"))


@pytest.mark.parametrize("sizes", [[10], [1 << 20] * 5, [1, 1 << 20, 3, 0, 1 << 19]])
def test_a_hash_beside_the_work_is_the_same(sizes: list[int]) -> None:
    hashed = StreamHash()
    chunks = [os.urandom(size) for size in sizes]
    for chunk in chunks:
        hashed.update(chunk)
    found: Digest = hashed.digest()
    assert found == digest_of(b"".join(chunks))
    hashed.close()
    assert not _hashing()
