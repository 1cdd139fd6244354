"""Every case of the catalogue on the kernel's overlay and on our FUSE mount."""

from __future__ import annotations

import pytest

from tests.differential import catalogue, known, sides
from tests.differential.machine import Machine, Outcome
from tests.differential.sides import KernelSide, Side
from tests.support.transports import TRANSPORTS

_FAMILIES = catalogue.families()
_PLAYED = [(name, transport) for transport in TRANSPORTS for name in catalogue.families(transport)]
_needs = pytest.mark.needs("root", "fuse", "overlay", "trusted-xattr", "mknod", "acl")


#: Known difference "protected-open": held back, a write that is no appending fails too late.
_OPTIONS = dict.fromkeys(("append_only", "append_flag"), ",writeback=off")


def _side(transport: str, family: str) -> Side:
    return sides.unionfs2_server(transport, _OPTIONS.get(family, ""))


def _play(place: bytes, other: Side, family: str) -> Outcome:
    history = catalogue.history(family, _FAMILIES[family])
    with Machine(KernelSide(), other, place) as machine:
        return machine.run(history)


def _report(outcome: Outcome) -> str:
    return "\n".join(str(difference) for difference in outcome.differences[:10])


@_needs
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("family", "transport"), _PLAYED)
def test_family(place: bytes, family: str, transport: str) -> None:
    outcome = _play(place, _side(transport, family), family)
    assert not outcome.differences, _report(outcome)
    assert outcome.op_count == sum(len(case.ops) + 3 for case in _FAMILIES[family])


@_needs
def test_the_kernel_passes_its_own_catalogue(place: bytes) -> None:
    for family in _FAMILIES:
        outcome = _play(place, KernelSide(), family)
        assert not outcome.differences, _report(outcome)


def test_the_catalogue_is_large_and_its_names_are_unique() -> None:
    cases = [case for family in _FAMILIES.values() for case in family]
    assert len({case.name for case in cases}) == len(cases)
    assert sum(len(case.ops) for case in cases) > 5000


_MET = {
    "pyfuse3": {"seek-hole", "inode-flags", "directory-seek"},
    "devfuse": {"directory-seek", "copy-up-at-first-write", "protected-open"},
}


@_needs
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_known_differences_are_met(place: bytes, transport: str) -> None:
    met: set[str] = set()
    for family in ("known_calls", "opens_for_writing", "protected"):
        excused = _play(place, _side(transport, family), family).excused
        met |= {ident for ident, count in excused.items() if count}
    assert _MET[transport] <= met <= known.idents(transport)
