"""The machine itself: silent where nothing differs, loud at every fault, and honest about both."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.differential import faults, generate, known, opened, pieces, script, sides
from tests.differential.compare import Difference
from tests.differential.machine import Machine
from tests.differential.script import History, Object, Op
from tests.differential.shrink import Shrinker
from tests.differential.sides import KernelSide, Side

_ROOT = Path(__file__).resolve().parents[2]
_kernel = pytest.mark.needs("root", "overlay", "trusted-xattr")

_LAYER = (
    Object(b"", "dir", 0o777),
    Object(b"gone", "file", content=b"gone"),
    Object(b"copied", "file", 0o640, content=b"data", xattrs=((b"user.note", b"v"),)),
    Object(b"untouched", "file", content=b"left alone"),
    Object(b"dir", "dir", 0o755),
    Object(b"dir/inner", "file", content=b"x"),
    Object(b"sparse", "sparse", content=(3 << 20, [(2 << 20, b"island")])),
    Object(b"pointer", "symlink", 0o777, content=b"copied"),
    Object(b"over", "dir", 0o777),
)
_OPS = (
    Op("root", "unlink", (b"gone",)),
    Op("root", "chmod", (b"copied", 0o644)),
    Op("root", "setxattr", (b"copied", b"user.more", (b"more", 1), 0, 1)),
    Op("root", "chmod", (b"dir/inner", 0o600)),
    Op("root", "utimens", (b"dir", 10**18, 10**18 + 5, 1)),
    Op("root", "truncate", (b"sparse", 3 << 20)),
    Op("root", "open", (0, b"one", 0o102, 0o644)),
    Op("root", "write", (0, (b"w", 10))),
    Op("root", "link", (b"one", b"two", 0)),
    Op("root", "link", (b"pointer", b"over/pointer", 0)),
    Op("root", "mkdir", (b"over/new", 0o755)),
    Op("root", "rename", (b"one", b"two", 1)),
    Op("root", "rename", (b"copied", b"over/copied", 1)),
    Op("root", "rename", (b"over/copied", b"copied", 0)),
    Op("root", "rename", (b"copied", b"sparse", 2)),
    Op("root", "rename", (b"copied", b"sparse", 2)),
)
_HISTORY = History("faults", (_LAYER,), (Object(b"", "dir", 0o777),), (_OPS,))


def _differences(place: bytes, other: Side, **more: Callable[[Op], Op]) -> tuple[Difference, ...]:
    rewrite = more.get("rewrite")
    with Machine(KernelSide(), other, place, rewrite=rewrite) as machine:
        return machine.run(_HISTORY).differences


@_kernel
def test_the_kernel_does_not_differ_from_itself(place: bytes) -> None:
    with Machine(KernelSide(), KernelSide(), place) as machine:
        assert machine.run(_HISTORY).differences == ()
        made = 0
        for seed in range(6):
            outcome = machine.run(*generate.history(seed, 300, pieces.TRUSTED))
            assert outcome.differences == (), f"seed {seed}"
            made += outcome.op_count
    assert made == 1800


@_kernel
@pytest.mark.parametrize("tamper", faults.TAMPERS, ids=lambda tamper: tamper.__name__)
def test_a_changed_directory_is_noticed(place: bytes, tamper: faults.Tamper) -> None:
    found = _differences(place, faults.TamperedSide(tamper))
    assert {item.kind for item in found} <= {"upper", "work", "lower"}
    assert found


@_kernel
@pytest.mark.parametrize("fault", faults.REWRITES)
def test_a_call_that_acts_differently_is_noticed(place: bytes, fault: str) -> None:
    found = _differences(place, KernelSide(), rewrite=faults.REWRITES[fault])
    # The value of an attribute is not an answer of any call here; the upper shows it.
    expected = "upper" if fault == "xattr has another value" else "call"
    assert [item.kind for item in found] == [expected]


_OPENS = (
    Op("root", "unaided", (opened.IDENT,)),
    Op("root", "open", (0, b"copied", os.O_RDWR, 0)),
    Op("root", "close", (0,)),
    Op("root", "open", (0, b"untouched", os.O_WRONLY, 0)),
    Op("root", "close", (0,)),
    Op("root", "open", (0, b"dir/inner", os.O_WRONLY | os.O_APPEND, 0)),
    Op("root", "close", (0,)),
)


class _CopiesUpLater(KernelSide):
    """The kernel's overlay under the name of the transport that does not hear of opens."""

    transport: str | None = "devfuse"


def _opens_to_read(op: Op) -> Op:
    """What brings nothing up, in the place of an open for writing."""
    if op.name != "open":
        return op
    return op._replace(args=(*op.args[:2], os.O_RDONLY, *op.args[3:]))


def _after_opens(place: bytes, reference: Side, ops: tuple[Op, ...] = _OPENS) -> list[Difference]:
    # In the second phase, the other side has the upper that the kernel wrote in the first.
    more = (ops[0], Op("root", "mkdir", (b"dir/new", 0o755)), Op("root", "unlink", (b"gone",)))
    history = History("opens", (_LAYER,), (Object(b"", "dir", 0o777),), (ops, more))
    with Machine(reference, _CopiesUpLater(), place, rewrite=_opens_to_read) as machine:
        return list(machine.run(history).differences)


@_kernel
def test_what_only_an_open_has_brought_up_is_accepted(place: bytes) -> None:
    assert _after_opens(place, KernelSide()) == []


@_kernel
@pytest.mark.parametrize(
    "tamper",
    [
        faults.stray_whiteout,
        faults.origin_dropped,
        faults.opaque_added,
        faults.plain_xattr_changed,
        faults.data_changed,
        faults.mtime_changed,
        faults.parent_mtime_changed,
        faults.mode_changed,
        faults.owner_changed,
    ],
    ids=lambda tamper: tamper.__name__,
)
def test_nothing_but_a_plain_copy_is_accepted(place: bytes, tamper: faults.Tamper) -> None:
    found = _after_opens(place, faults.TamperedSide(tamper))
    assert [item.kind for item in found][:1] == ["upper"]


@_kernel
def test_a_copy_up_that_is_missing_is_noticed_where_the_worker_helps(place: bytes) -> None:
    found = _after_opens(place, KernelSide(), _OPENS[1:5])
    assert {item.kind for item in found} == {"upper"}


@_kernel
@pytest.mark.needs("fuse", "command:fuse-overlayfs")
def test_a_peer_is_mounted_compared_and_found_to_differ(place: bytes) -> None:
    with Machine(KernelSide(), sides.fuse_overlayfs(), place) as machine:
        found = machine.run(_HISTORY).differences
    assert found
    assert {item.kind for item in found} == {"call"}
    assert place + b"/" not in Path("/proc/self/mountinfo").read_bytes()


@_kernel
@pytest.mark.needs("fuse")
def test_a_server_that_dies_is_a_difference_not_a_hang(place: bytes) -> None:
    side = sides.CommandSide("dies", ["sh", "-c", "echo no such luck >&2; exit 3"])
    found = _differences(place, side)
    assert [item.kind for item in found] == ["mount"]
    assert "no such luck" in str(found[0].other)


@_kernel
def test_shrinking_keeps_what_matters(place: bytes) -> None:
    noise = tuple(Op("root", "lstat", (b"untouched",)) for _n in range(20))
    history = _HISTORY._replace(phases=((*noise, *_OPS, *noise),))
    rewrite = faults.REWRITES["chmod loses a bit"]
    with Machine(KernelSide(), KernelSide(), place, rewrite=rewrite) as machine:
        small = Shrinker(lambda h: machine.run(h).differences, "call", 30).shrink(history)
    assert small.size == 1
    assert small.phases[0][0].name == "chmod"
    assert sum(len(layer) for layer in small.layers) == 1


def test_a_history_survives_its_text() -> None:
    plan, source = generate.history(7, 100, pieces.TRUSTED)
    whole = plan._replace(phases=(tuple(source.batch(0)),))
    assert script.load(script.dump(whole)) == whole


def test_a_seed_gives_the_same_history_again() -> None:
    first = generate.history(11, 50, pieces.TRUSTED)
    second = generate.history(11, 50, pieces.TRUSTED)
    assert first[0] == second[0]
    assert list(first[1].batch(0)) == list(second[1].batch(0))
    assert random.Random(11).random() == random.Random(11).random()


def test_every_known_difference_is_documented_and_no_other() -> None:
    text = (_ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")
    section = text.split("## Differences from the kernel", 1)[1].split("\n## ", 1)[0]
    assert re.findall(r"^### (?!`[a-z-]+` \(\w+\)$).*", section, re.MULTILINE) == []
    documented = dict(re.findall(r"^### `([a-z-]+)` \((\w+)\)$", section, re.MULTILINE))
    where = {"both": known.BOTH, "pyfuse3": known.PYFUSE3, "devfuse": known.DEVFUSE}
    assert {ident: where[word] for ident, word in documented.items()} == known.table()
