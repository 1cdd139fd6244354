"""File content: append, holes, sizes beyond 4 GiB, memory mappings."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from tests.semantics.rig import Rig

GIB = 1 << 30
MIB = 1 << 20


def _blocks_bytes(path: Path) -> int:
    return os.stat(path).st_blocks * 512


def test_append_goes_to_the_end_of_a_lower_file(rig: Rig) -> None:
    (rig.lower / "log").write_bytes(b"one\n")
    merged = rig.mount() / "log"
    for line in (b"two\n", b"three\n"):
        with merged.open("ab") as log:
            log.write(line)
    assert merged.read_bytes() == b"one\ntwo\nthree\n"
    assert (rig.lower / "log").read_bytes() == b"one\n"


def test_two_appending_descriptors_never_overwrite_each_other(rig: Rig) -> None:
    (rig.lower / "log").write_bytes(b"start")
    merged = rig.mount() / "log"
    with merged.open("ab", buffering=0) as first, merged.open("ab", buffering=0) as second:
        for _ in range(10):
            first.write(b"A")
            second.write(b"B")
    assert merged.read_bytes() == b"start" + b"AB" * 10


def test_appending_descriptor_ignores_its_position(rig: Rig) -> None:
    merged = rig.mount() / "log"
    fd = os.open(merged, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        os.write(fd, b"abc")
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"def")
        assert os.pread(fd, 100, 0) == b"abcdef"
    finally:
        os.close(fd)


def test_append_after_somebody_else_truncated(rig: Rig) -> None:
    (rig.lower / "log").write_bytes(b"0123456789")
    merged = rig.mount() / "log"
    with merged.open("ab", buffering=0) as log:
        os.truncate(merged, 2)
        log.write(b"x")
    assert merged.read_bytes() == b"01x"


def test_truncate_to_a_larger_size_reads_zeros(rig: Rig) -> None:
    (rig.lower / "f").write_bytes(b"abc")
    merged = rig.mount() / "f"
    os.truncate(merged, 10_000)
    assert merged.read_bytes() == b"abc" + bytes(9_997)
    os.truncate(merged, 2)
    os.truncate(merged, 5)
    assert merged.read_bytes() == b"ab\0\0\0"


def test_sparse_lower_file_stays_sparse_through_copy_up(rig: Rig) -> None:
    with (rig.lower / "sparse").open("wb") as file:
        for position in (0, 100 * MIB, 200 * MIB):
            file.seek(position)
            file.write(b"data")
        file.truncate(300 * MIB)
    merged = rig.mount() / "sparse"
    with merged.open("r+b") as file:
        file.seek(150 * MIB)
        file.write(b"more")
    assert merged.stat().st_size == (rig.top / "sparse").stat().st_size == 300 * MIB
    # the kernel copies pieces of 1 MiB around data
    assert _blocks_bytes(rig.top / "sparse") <= 8 * MIB
    with merged.open("rb") as file:
        for position, data in ((0, b"data"), (100 * MIB, b"data"), (150 * MIB, b"more")):
            file.seek(position - 4 if position else 0)
            assert file.read(8).strip(b"\0") == data
        file.seek(200 * MIB)
        assert file.read(4) == b"data"


def test_file_of_holes_only_takes_no_space_when_copied_up(rig: Rig) -> None:
    with (rig.lower / "hole").open("wb") as file:
        file.truncate(64 * MIB)
    merged = rig.mount() / "hole"
    merged.chmod(0o600)
    assert (rig.top / "hole").stat().st_size == 64 * MIB
    assert _blocks_bytes(rig.top / "hole") <= MIB


def test_file_written_sparsely_stays_sparse(rig: Rig) -> None:
    merged = rig.mount() / "f"
    with merged.open("wb") as file:
        file.seek(100 * MIB)
        file.write(b"end")
    assert merged.stat().st_size == 100 * MIB + 3
    assert _blocks_bytes(rig.top / "f") <= MIB


def test_seek_data_and_hole_give_a_layout_that_covers_all_data(rig: Rig) -> None:
    with (rig.lower / "sparse").open("wb") as file:
        file.seek(4 * MIB)
        file.write(b"data")
        file.truncate(8 * MIB)
    merged = rig.mount() / "sparse"
    fd = os.open(merged, os.O_RDONLY)
    try:
        start = os.lseek(fd, 0, os.SEEK_DATA)
        end = os.lseek(fd, start, os.SEEK_HOLE)
        assert start <= 4 * MIB
        assert end >= 4 * MIB + 4
    finally:
        os.close(fd)


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_file_beyond_4_gib_is_read_and_written(rig: Rig, where: str) -> None:
    tree = rig.lower if where == "lower" else rig.top
    with (tree / "huge").open("wb") as file:
        file.seek(4 * GIB + 5)
        file.write(b"beyond")
        file.truncate(5 * GIB)
    merged = rig.mount() / "huge"
    assert merged.stat().st_size == 5 * GIB
    fd = os.open(merged, os.O_RDWR)
    try:
        assert os.pread(fd, 6, 4 * GIB + 5) == b"beyond"
        assert os.pread(fd, 6, 5) == bytes(6)
        assert os.pwrite(fd, b"above", 4 * GIB + 5) == 5
        assert os.pwrite(fd, b"far", 6 * GIB) == 3
        assert os.fstat(fd).st_size == 6 * GIB + 3
    finally:
        os.close(fd)
    assert _blocks_bytes(rig.top / "huge") <= 8 * MIB
    os.truncate(merged, 4 * GIB + 7)
    with merged.open("rb") as file:
        file.seek(4 * GIB + 5)
        assert file.read() == b"ab"


def test_mapping_is_read_of_lower_and_upper(rig: Rig) -> None:
    (rig.lower / "l").write_bytes(b"lower" * 5000)
    (rig.top / "u").write_bytes(b"upper" * 5000)
    merged = rig.mount()
    for name, word in (("l", b"lower"), ("u", b"upper")):
        with (merged / name).open("rb") as file:
            for access in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
                with mmap.mmap(file.fileno(), 0, access, mmap.PROT_READ) as view:
                    assert view[:] == word * 5000


def test_shared_mapping_written_is_seen_by_read_and_reaches_the_upper(rig: Rig) -> None:
    (rig.lower / "f").write_bytes(bytes(10_000))
    merged = rig.mount() / "f"
    with merged.open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as view:
        view[5000:5005] = b"words"
        assert os.pread(file.fileno(), 5, 5000) == b"words"
        os.pwrite(file.fileno(), b"other", 7000)
        assert view[7000:7005] == b"other"
        view.flush()
        assert (rig.top / "f").read_bytes()[5000:5005] == b"words"
    rig.remount()
    assert merged.read_bytes()[5000:5005] == b"words"
    assert merged.read_bytes()[7000:7005] == b"other"


def test_shared_mapping_outlives_its_descriptor(rig: Rig) -> None:
    (rig.lower / "f").write_bytes(bytes(8192))
    merged = rig.mount() / "f"
    with merged.open("r+b") as file:
        view = mmap.mmap(file.fileno(), 0)
    view[0:5] = b"words"
    view.close()
    assert merged.read_bytes()[:5] == b"words"
    rig.remount()
    assert merged.read_bytes()[:5] == b"words"


def test_shared_mapping_of_an_unlinked_file(rig: Rig) -> None:
    merged = rig.mount() / "f"
    merged.write_bytes(bytes(4096))
    with merged.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        merged.unlink()
        view[0:5] = b"words"
        assert os.pread(file.fileno(), 5, 0) == b"words"


def test_two_processes_share_a_mapping(rig: Rig) -> None:
    merged = rig.mount() / "f"
    merged.write_bytes(bytes(4096))
    with merged.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        pid = os.fork()
        if pid == 0:
            with merged.open("r+b") as own, mmap.mmap(own.fileno(), 0) as other:
                other[100:105] = b"child"
                os._exit(0)
        os.waitpid(pid, 0)
        assert view[100:105] == b"child"


def test_private_mapping_never_reaches_the_file(rig: Rig) -> None:
    (rig.lower / "f").write_bytes(bytes(4096))
    merged = rig.mount() / "f"
    with merged.open("rb") as file:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, protection) as view:
            view[0:5] = b"words"
    assert merged.read_bytes() == bytes(4096)
    assert not list(rig.top.iterdir())


def test_mapping_made_after_copy_up_follows_writes(rig: Rig) -> None:
    (rig.lower / "f").write_bytes(b"old" * 2000)
    merged = rig.mount() / "f"
    with merged.open("r+b", buffering=0) as writer, merged.open("rb") as reader:
        view = mmap.mmap(reader.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        writer.write(b"NEW")
        assert view[:6] == b"NEWold"
        view.close()


def test_program_of_the_lower_can_be_run_and_then_replaced(rig: Rig) -> None:
    program = rig.lower / "program"
    program.write_bytes(Path("/bin/true").read_bytes())
    program.chmod(0o755)
    merged = rig.mount() / "program"
    assert os.spawnv(os.P_WAIT, merged, ["program"]) == 0
    new = merged.with_name("new")
    new.write_bytes(Path("/bin/false").read_bytes())
    new.chmod(0o755)
    new.rename(merged)
    assert os.spawnv(os.P_WAIT, merged, ["program"]) == 1


def test_large_file_is_copied_up_byte_for_byte(rig: Rig) -> None:
    block = os.urandom(MIB)
    data = b"".join(bytes([number]) + block[1:] for number in range(20)) + b"tail"
    (rig.lower / "f").write_bytes(data)
    merged = rig.mount() / "f"
    os.utime(merged, ns=(1, 2))
    assert (rig.top / "f").read_bytes() == data
    assert merged.read_bytes() == data


def test_read_past_the_end_and_empty_reads(rig: Rig) -> None:
    (rig.lower / "f").write_bytes(b"abc")
    merged = rig.mount() / "f"
    fd = os.open(merged, os.O_RDONLY)
    try:
        assert os.pread(fd, 10, 2) == b"c"
        assert os.pread(fd, 10, 3) == b""
        assert os.pread(fd, 10, 1 << 40) == b""
        assert os.pread(fd, 0, 0) == b""
    finally:
        os.close(fd)
