"""``unionfs2 layer`` as somebody uses it: whole sessions, on both backends."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import eventually
from tests.e2e.shelf import (
    BASE,
    HOW,
    ODD_IDS,
    Shelf,
    Terminal,
    names_in_tar,
    shelf_of,
    tar_of,
)
from tests.support import mounts

pytestmark = pytest.mark.needs("root")

WORK = "rm etc/motd && echo box > etc/hostname && mkdir new && echo n > new/file && rm -r usr"
CHANGES = ["C /etc", "C /etc/hostname", "D /etc/motd", "A /new", "A /new/file", "D /usr"]


@pytest.fixture(params=HOW)
def shelf(request: pytest.FixtureRequest) -> Iterator[Shelf]:
    with shelf_of(request.param) as shelf:
        yield shelf


@pytest.fixture
def plain() -> Iterator[Shelf]:
    """For what no mount has a part in."""
    with shelf_of(None) as shelf:
        yield shelf


def make_base(shelf: Shelf, layer: str = "base") -> None:
    shelf.ok("layer", "create", "--id", layer)
    shelf.ok("layer", "apply", layer, given=tar_of(BASE))


def make_box(shelf: Shelf) -> None:
    """A base, and a box on it in which somebody has worked."""
    make_base(shelf)
    shelf.ok("layer", "create", "--id", "box", "--parent", "base", "--writable")
    path = shelf.ok("layer", "mount", "box")
    subprocess.run(["sh", "-ec", WORK], cwd=path, check=True)
    shelf.ok("layer", "umount", "box")


# --- a session ------------------------------------------------------------------------------------


def test_from_a_tar_to_a_tar(shelf: Shelf) -> None:
    base = shelf.ok("layer", "create")
    assert re.fullmatch("[0-9a-f]{64}", base)
    stream = tar_of(BASE)
    digest = f"sha256:{hashlib.sha256(stream).hexdigest()}"
    assert shelf.ok("layer", "apply", base[:8], "--digest", digest, given=stream) == digest

    box = shelf.ok("layer", "create", "--parent", base, "--writable", "--label", "")
    path = Path(shelf.ok("layer", "mount", box))
    assert sorted(os.listdir(path)) == ["etc", "usr"]
    assert shelf.ok("layer", "mount", box) == str(path)  # twice asked for, once mounted
    assert len(mounts.below(shelf.home)) == 1
    subprocess.run(["sh", "-ec", WORK], cwd=path, check=True)
    shelf.ok("layer", "umount", box)
    assert len(mounts.below(shelf.home)) == 1
    shelf.ok("layer", "umount", box)
    assert mounts.below(shelf.home) == []

    assert shelf.ok("layer", "changes", box).splitlines() == CHANGES
    told = shelf.ok("layer", "diff", box, "-o", "changes.tar")
    data = (shelf.root / "changes.tar").read_bytes()
    assert told == f"sha256:{hashlib.sha256(data).hexdigest()}"
    names = [name.removeprefix("./") for name in names_in_tar(data)]
    assert {"etc/hostname", "etc/.wh.motd", "new/file", ".wh.usr"} <= set(names)
    assert shelf.run("layer", "diff", box).out == data
    assert (shelf.root / "changes.tar").stat().st_mode & 0o777 == 0o644

    frozen = shelf.ok("layer", "commit", box, "--id", "frozen", "--keep")
    assert frozen == "frozen"
    assert shelf.ok("layer", "changes", box) == ""
    assert shelf.ok("layer", "changes", "frozen").splitlines() == CHANGES
    assert shelf.ids() == sorted([base, box, "frozen"])
    shelf.ok("layer", "rm", box, "frozen", base)
    assert shelf.ids() == []
    done = shelf.run("check", "--deep")
    assert (done.status, done.out) == (0, b"")
    assert "nothing to find fault with in" in done.err


def test_one_store_into_another(shelf: Shelf) -> None:
    make_box(shelf)
    script = (
        "set -e; unionfs2 --root other layer create --id base >&2; "
        "unionfs2 layer diff base | unionfs2 --root other layer apply base -; "
        "unionfs2 --root other layer create --id box --parent base --writable >&2; "
        "unionfs2 layer diff --compress gzip box | unionfs2 --root other layer apply box; "
        "unionfs2 --root other layer changes box"
    )
    done = shelf.shell(script)
    assert (done.status, done.err) == (0, "base\nbox\n")
    lines = done.text.splitlines()
    assert lines[2:] == CHANGES
    streams = [shelf.run("layer", "diff", layer).out for layer in ("base", "box")]
    assert lines[:2] == [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in streams]


def test_cd_into_a_mount(shelf: Shelf) -> None:
    make_box(shelf)
    words = " ".join(shelf.words)
    script = f'cd "$(unionfs2 {words} layer mount box)" && cat etc/hostname && cd / && '
    done = shelf.shell(f"{script} unionfs2 layer umount box")
    assert done == (0, b"box\n", "")
    assert mounts.below(shelf.home) == []


def test_mounting_in_a_place_of_ones_own(shelf: Shelf) -> None:
    make_box(shelf)
    place = shelf.root / "my place"
    place.mkdir()
    assert shelf.ok("layer", "mount", "box", "my place") == str(place)
    assert (place / "etc" / "hostname").read_text() == "box\n"
    assert "mounted at" in shelf.refused("layer", "mount", "box", shelf.root / "bin")
    assert shelf.ok("layer", "mount", "box") == str(place)
    (row,) = [row for row in shelf.json("layer", "ls") if row["id"] == "box"]
    assert (row["path"], row["mounted"]) == (str(place), 2)
    shelf.ok("layer", "umount", "box")
    shelf.ok("layer", "umount", "box")
    assert os.listdir(place) == []
    assert mounts.below(shelf.root) == []


def test_a_writable_layer_without_parent(shelf: Shelf) -> None:
    shelf.ok("layer", "create", "--id", "alone", "--writable")
    path = Path(shelf.ok("layer", "mount", "alone"))
    (path / "file").write_text("f")
    shelf.ok("layer", "umount", "alone")
    assert shelf.ok("layer", "changes", "alone") == "A /file"
    place = shelf.root / "place"
    place.mkdir()
    shelf.ok("layer", "mount", "alone", place)
    assert (place / "file").read_text() == "f"
    shelf.ok("layer", "umount", "alone")
    assert mounts.below(shelf.root) == []


def test_what_was_committed_cannot_be_changed(shelf: Shelf) -> None:
    make_base(shelf)
    path = Path(shelf.ok("layer", "mount", "base"))
    with pytest.raises(OSError, match="Read-only"):
        (path / "new").touch()
    assert "base" in shelf.refused("layer", "rm", "base")
    shelf.ok("layer", "umount", "base")
    assert "base" in shelf.refused("layer", "apply", "base", given=tar_of(BASE))


def test_limits(shelf: Shelf) -> None:
    make_base(shelf)
    words = ["layer", "create", "--parent", "base", "--writable", "--storage-opt", "size=1M"]
    done = shelf.run(*words, "--storage-opt", "inodes=100", "--id", "small")
    if done.status:  # natively this needs a file system with project quota
        assert "native" in shelf.words
        assert done.status == 1
        assert "use the fuse backend" in done.err
        return
    path = Path(shelf.ok("layer", "mount", "small"))
    with pytest.raises(OSError, match="quota"):
        (path / "big").write_bytes(bytes(2 << 20))
    shelf.ok("layer", "umount", "small")
    (row,) = [row for row in shelf.json("layer", "ls") if row["id"] == "small"]
    assert (row["size_max_bytes"], row["inodes_max"]) == (1 << 20, 100)


def test_flatten_and_rebase(shelf: Shelf) -> None:
    make_box(shelf)
    flat = shelf.ok("layer", "flatten", "box", "--id", "flat")
    assert flat == "flat"
    assert shelf.ok("layer", "changes", "flat").splitlines() == [
        "A /etc",
        "A /etc/hostname",
        "A /new",
        "A /new/file",
    ]
    assert shelf.ok("layer", "changes", "flat", "--against", "box") == ""
    make_base(shelf, "other")
    moved = shelf.ok("layer", "rebase", "box", "--onto", "other", "--id", "moved")
    assert moved == "moved"
    assert shelf.ok("layer", "changes", "moved").splitlines() == CHANGES
    assert shelf.json("layer", "inspect", "moved")[0]["parent"] == "other"


def test_any_two_layers(shelf: Shelf) -> None:
    make_box(shelf)
    shelf.ok("layer", "create", "--id", "sibling", "--parent", "base", "--writable")
    shelf.ok("layer", "apply", "sibling", given=tar_of({"etc/motd": "other\n"}))
    lines = shelf.ok("layer", "changes", "sibling", "--against", "box").splitlines()
    assert {"A /etc/motd", "C /etc/hostname", "A /usr", "A /usr/tool", "D /new"} <= set(lines)
    data = shelf.run("layer", "diff", "sibling", "--parent", "box").out
    assert ".wh.new" in [name.removeprefix("./") for name in names_in_tar(data)]
    everything = shelf.run("layer", "diff", "sibling", "--parent", "").out
    names = [name.removeprefix("./") for name in names_in_tar(everything)]
    assert {"etc/motd", "etc/hostname", "usr/tool"} <= set(names)


def test_odd_ids(shelf: Shelf) -> None:
    make_base(shelf)
    for layer in ODD_IDS:
        made = shelf.ok("layer", "create", f"--id={layer}", "--parent", "base", "--writable")
        assert made == layer
        path = Path(shelf.ok("layer", "mount", "--", layer))
        (path / "new").touch()
    assert shelf.ok("layer", "changes", "--", layer) == "A /new"
    rows = {row["id"]: row for row in shelf.json("layer", "ls")}
    assert rows.keys() == {"base", *ODD_IDS}
    assert rows[ODD_IDS[-1]]["path"] == str(path)
    tree = shelf.ok("layer", "tree")
    assert [layer for layer in ODD_IDS if layer not in tree] == []
    shelf.ok("layer", "umount", "--", *ODD_IDS)
    assert mounts.below(shelf.home) == []
    shelf.ok("layer", "rm", "--", *ODD_IDS, "base")
    assert shelf.ids() == []


# --- results --------------------------------------------------------------------------------------


def test_paths_that_are_no_text(plain: Shelf) -> None:
    plain.ok("layer", "create", "--id", "odd", "--writable")
    root = os.fsencode(plain.ok("layer", "mount", "odd"))
    names = [b"new\nline", b"odd\xff", b"back\\slash", b"a space"]
    for name in names:
        with open(os.path.join(root, name), "wb"):
            pass
    lines = plain.ok("layer", "changes", "odd").splitlines()
    assert lines == ["A /a space", "A /back\\\\slash", "A /new\\x0aline", "A /odd\\xff"]
    raw = plain.run("layer", "changes", "odd", "-0").out
    assert raw == b"".join(b"A /%b\0" % name for name in sorted(names))
    found = plain.json("layer", "changes", "odd")
    assert found[-1] == {"kind": "A", "path": "/odd\udcff"}
    assert [os.fsencode(row["path"]) for row in found] == [b"/" + name for name in sorted(names)]
    told = plain.refused("layer", "changes", "odd", "--null", "--format", "json")
    assert told == "--null and --format json exclude each other"


def test_json(plain: Shelf) -> None:
    made = plain.json("layer", "create", "--id", "base")
    assert made == {"id": "base"}
    stream = tar_of(BASE)
    done = plain.run("layer", "apply", "base", "--format", "json", given=stream)
    applied = json.loads(done.out)
    assert applied.pop("diff_id") == f"sha256:{hashlib.sha256(stream).hexdigest()}"
    assert applied == {"size_bytes": 12, "inodes": 5, "entries": 5}
    plain.ok("layer", "create", "--id", "box", "--parent", "base", "--writable", "--label", "l:s0")
    base, box = plain.json("layer", "ls")
    assert set(base) == {
        *("id", "parent", "state", "reason", "size_bytes", "inodes", "mounted", "path", "created"),
        *("label", "dialect", "size_max_bytes", "inodes_max"),
    }
    assert (base["id"], base["state"], base["parent"]) == ("base", "committed", None)
    assert (base["size_bytes"], base["inodes"], base["mounted"]) == (12, 5, 0)
    assert (box["id"], box["state"], box["parent"]) == ("box", "writable", "base")
    assert (box["label"], box["path"]) == ("l:s0", None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", box["created"])
    assert plain.json("layer", "changes", "box") == []

    tree = plain.json("layer", "tree")
    assert [(row["id"], row["depth"], row["children"]) for row in tree] == [
        ("base", 0, ["box"]),
        ("box", 1, []),
    ]
    usage = plain.json("layer", "usage", "box")
    assert usage == [
        {
            "id": "box",
            "own_bytes": 0,
            "own_inodes": 0,
            "exclusive_bytes": 12,
            "exclusive_inodes": 5,
            "shared_bytes": 0,
            "shared_inodes": 0,
        }
    ]
    holds = plain.json("layer", "which", "box", "/etc/motd")
    assert [(row["layer"], row["visible"]) for row in holds] == [("base", True)]
    (about,) = json.loads(plain.ok("layer", "inspect", "box"))
    assert about["parent"] == "base"
    assert about["metadata"]["UpperDir"] == str(plain.home / "box" / "diff")
    info = plain.json("info")
    assert (info["home"], info["layers"]) == (str(plain.home), 2)
    assert plain.json("check") == []
    assert plain.json("prune") == []
    assert plain.json("repair") == {"repaired": [], "left": []}


def test_tables_in_a_pipe(plain: Shelf) -> None:
    long = "0123456789abcdef" * 4
    make_base(plain, long)
    plain.ok("layer", "create", "--id", "box", "--parent", long, "--writable", "--label", "web")
    lines = [line.split() for line in plain.ok("layer", "ls").splitlines()]
    assert lines[0] == ["ID", "PARENT", "STATE", "SIZE", "MOUNTED", "CREATED", "LABEL"]
    assert lines[1][:5] == [long, "-", "committed", "12", "-"]
    assert lines[2][:5] == ["box", long, "writable", "-", "-"]
    assert lines[2][6] == "web"
    assert plain.ok("layer", "tree").splitlines() == [
        f"{long}  (committed)",
        "`- box  (writable, web)",
    ]
    assert plain.ok("layer", "usage", "-q").splitlines() == [long, "box"]
    assert "Backing Filesystem: " in plain.ok("info")


def test_a_table_on_a_terminal(plain: Shelf) -> None:
    long = "0123456789abcdef" * 4
    make_base(plain, long)
    terminal = Terminal()
    environment = {"COLUMNS": "120", "TERM": "xterm"}
    assert plain.run("layer", "ls", environment=environment, stdout=terminal.slave).status == 0
    text = terminal.text()
    assert long[:12] in text
    assert long[:13] not in text
    assert "12 B" in text


def test_a_tar_stream_is_not_for_a_terminal(plain: Shelf) -> None:
    make_base(plain)
    terminal = Terminal()
    done = plain.run("layer", "diff", "base", stdout=terminal.slave)
    assert (done.status, terminal.text()) == (1, "")
    assert done.err == "unionfs2: a tar stream is not for a terminal: use -o FILE, or a pipe\n"


def test_progress_on_a_terminal_only(plain: Shelf) -> None:
    plain.ok("layer", "create", "--id", "base")
    stream = tar_of({"big": "x" * 400_000})
    terminal = Terminal()
    with subprocess.Popen(
        [sys.executable, "-m", "unionfs2", "layer", "apply", "base"],
        env={**plain.environment, "COLUMNS": "100", "TERM": "xterm"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=terminal.slave,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(stream[:200_000])
        process.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.3)
        process.stdin.write(stream[200_000:])
        process.stdin.close()
        out = process.stdout.read()
    assert process.returncode == 0
    assert re.fullmatch(rb"sha256:[0-9a-f]{64}\n", out)
    assert "applying" in terminal.text()


# --- names of layers ------------------------------------------------------------------------------


def test_the_beginning_of_an_id(plain: Shelf) -> None:
    one, two = "abcdef0" + "1" * 57, "abcdef1" + "2" * 57
    for layer in (one, two, "abcdef12"):
        plain.ok("layer", "create", "--id", layer)
    assert plain.json("layer", "inspect", "abcdef0")[0]["id"] == one
    assert plain.json("layer", "inspect", "abcdef12")[0]["id"] == "abcdef12"  # means itself
    assert plain.json("layer", "inspect", "abcdef122")[0]["id"] == two
    assert plain.refused("layer", "inspect", "abcdef") == (
        f'"abcdef" is the beginning of 2 layer ids, {one} and {two} among them: give more digits'
    )
    assert plain.refused("layer", "inspect", "abcde").startswith('there is no layer "abcde"')


def test_did_you_mean(plain: Shelf) -> None:
    make_base(plain)
    assert plain.refused("layer", "mount", "bsae") == (
        'there is no layer "bsae": did you mean "base"?'
    )
    assert plain.refused("layer", "mount", "zzz") == (
        'there is no layer "zzz": see unionfs2 layer ls'
    )
    assert plain.refused("layer", "mount", "") == (
        "the layer id is empty: name a layer, see unionfs2 layer ls"
    )


# --- refusals -------------------------------------------------------------------------------------


def test_a_store_that_is_not_there_is_not_made_by_looking(plain: Shelf) -> None:
    told = plain.refused("layer", "ls")
    assert str(plain.home) in told
    assert not plain.home.exists()


def test_errors_are_one_sentence(plain: Shelf) -> None:
    make_base(plain)
    plain.ok("layer", "create", "--id", "box", "--parent", "base", "--writable")
    assert "box" in plain.refused("layer", "rm", "base")
    assert "box" in plain.refused("layer", "rm", "-f", "base")
    assert "base" in plain.refused("layer", "create", "--id", "base")
    assert "slash" in plain.refused("layer", "create", "--id", "a/b")
    assert 'did you mean "size"' in plain.refused("layer", "create", "--storage-opt", "szie=1G")
    assert "malformed" in plain.refused("layer", "ls", "--storage-opt", "size")
    assert "negative" in plain.refused("layer", "create", "--storage-opt", "size=-1G")
    assert "lower-case hex" in plain.refused("layer", "apply", "box", "--digest", "sha256:12")
    wrong = f"sha256:{'0' * 64}"
    told = plain.refused("layer", "apply", "box", "--digest", wrong, given=tar_of(BASE))
    assert wrong in told
    told = plain.refused("layer", "apply", "box", given=tar_of(BASE)[:1000])
    assert plain.ok("layer", "changes", "box") == ""
    plain.refused("layer", "apply", "box", "no.tar", status=32)
    plain.refused("layer", "diff", "box", "-o", "no/where", status=32)
    plain.refused("layer", "mount", "box", "no/place", status=32)
    assert plain.leftovers() == []
    assert sorted(os.listdir(plain.root)) == ["bin", "st ore,a:b", "state"]


def test_several_layers(plain: Shelf) -> None:
    for layer in ("a", "b", "c"):
        plain.ok("layer", "create", "--id", layer)
    done = plain.run("layer", "rm", "a", "nope", "b")
    assert (done.status, done.out) == (64, b"")
    assert done.err == 'unionfs2: there is no layer "nope": see unionfs2 layer ls\n'
    assert plain.ids() == ["c"]
    plain.ok("layer", "rm", "--force", "nope", "c")
    assert plain.ids() == []


def test_an_existing_file_is_replaced_when_the_new_one_is_complete(plain: Shelf) -> None:
    make_base(plain)
    target = plain.root / "out.tar"
    target.write_text("old")
    plain.refused("layer", "diff", "nope", "-o", target)
    assert target.read_text() == "old"
    plain.ok("layer", "diff", "base", "-o", target)
    assert "etc/motd" in [name.removeprefix("./") for name in names_in_tar(target.read_bytes())]
    assert plain.ok("layer", "diff", "base", "-o", "/dev/null").startswith("sha256:")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_reader_that_goes_away_is_no_error(plain: Shelf) -> None:
    make_base(plain)
    done = plain.shell("unionfs2 layer diff base | head -c 10 | wc -c; unionfs2 layer ls | true")
    assert (done.text.strip(), done.err) == ("10", "")


# --- interruption ---------------------------------------------------------------------------------


def test_interrupted_while_applying(plain: Shelf) -> None:
    plain.ok("layer", "create", "--id", "base")
    with subprocess.Popen(
        [sys.executable, "-m", "unionfs2", "layer", "apply", "base"],
        env=plain.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(tar_of({"big": "x" * 400_000})[:300_000])
        process.stdin.flush()
        assert eventually(lambda: plain.leftovers() != [])
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (8, b"unionfs2: interrupted\n")
    assert plain.leftovers() == []
    assert plain.ok("layer", "changes", "base") == ""
    assert plain.json("check") == []


# --- health ---------------------------------------------------------------------------------------


def test_damage_is_found_and_mended(plain: Shelf) -> None:
    make_base(plain)
    plain.ok("layer", "create", "--id", "box", "--parent", "base", "--writable")
    plain.ok("layer", "create", "--id", "fine")
    (plain.home / "box" / "lower").write_text("")
    done = plain.run("check", "--format", "json")
    assert done.status == 3
    assert done.err == ""
    assert [found["layer"] for found in json.loads(done.out)] == ["box"]
    assert "lower" in plain.refused("layer", "mount", "box")
    assert plain.ok("layer", "changes", "fine") == ""
    states = {row["id"]: row["state"] for row in plain.json("layer", "ls")}
    assert states["box"] == "damaged"
    plain.run("repair")
    assert plain.run("check").status == 0
    assert "base" in plain.ids()


def test_prune(plain: Shelf) -> None:
    make_base(plain)
    plain.ok("layer", "create", "--id", "box", "--writable")
    left = plain.home / "l" / ("X" * 26)
    left.symlink_to("../gone/diff")
    assert "would remove" in plain.ok("prune", "--dry-run")
    assert left.is_symlink()
    assert "removed" in plain.ok("prune")
    assert not left.is_symlink()
    assert plain.ok("prune") == ""
    assert "base" in plain.ok("prune", "--unused", "--dry-run")
    plain.ok("prune", "--unused")
    assert plain.ids() == ["box"]
