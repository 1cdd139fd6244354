"""Acting for a caller, and what is known of one."""

from __future__ import annotations

import os
import threading

import pytest

from unionfs2 import creds
from unionfs2 import syscalls as sc
from unionfs2.creds import Actor
from unionfs2.model import Caller


def fs_ids() -> tuple[int, int]:
    with open(f"/proc/self/task/{threading.get_native_id()}/status", encoding="ascii") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["Uid"].split()[3]), int(fields["Gid"].split()[3])


def test_the_server_itself_switches_nothing() -> None:
    actor = Actor()
    before = fs_ids()
    with actor.acting(Caller(os.geteuid(), os.getegid(), umask=0o027)):
        assert fs_ids() == before
        seen = os.umask(0o027)
    assert seen == 0o027
    assert os.umask(0) == 0
    assert fs_ids() == before


@pytest.mark.needs("root")
@pytest.mark.parametrize("fails", [True, False])
def test_ids_are_the_callers_inside_and_the_servers_after(fails: bool) -> None:
    actor = Actor()
    assert actor.may_switch
    before = fs_ids()
    try:
        with actor.acting(Caller(12, 34, umask=0o077)):
            assert fs_ids() == (12, 34)
            if fails:
                raise OSError
    except OSError:
        pass
    with actor.acting(Caller(12, 34), gid=56, umask=False):
        assert fs_ids() == (12, 56)
    assert fs_ids() == before
    assert os.umask(0) == 0


@pytest.mark.needs("root")
def test_capabilities_stay_while_acting() -> None:
    """A caller's new file may land in a directory that only the server may enter."""
    actor = Actor()
    with actor.acting(Caller(12, 34)), open("/proc/thread-self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    assert int(fields["CapEff"], 16) >> 1 & 1, "CAP_DAC_OVERRIDE"


def test_ids_that_do_not_take_are_refused() -> None:
    if os.geteuid() == 0:
        # -1 is no id at all, for root neither.
        with pytest.raises(PermissionError):
            sc.set_fs_ids(0xFFFFFFFE + 1, 0)
        return
    with pytest.raises(PermissionError):
        sc.set_fs_ids(os.geteuid() + 1, os.getegid())


def test_groups_of_a_process() -> None:
    mine = creds.groups_of(Caller(os.geteuid(), os.getegid(), os.getpid()))
    assert mine == {os.getegid(), *os.getgroups()}
    assert creds.groups_of(Caller(1, 2)) == {2}
    assert creds.groups_of(Caller(1, 2, pid=2**22 + 1)) == {2}


def test_without_a_process_only_root_is_privileged() -> None:
    for caller, expected in ((Caller(0, 0), True), (Caller(1, 0), False)):
        assert creds.keeps_suid(caller) is expected
        assert creds.sees_trusted(caller) is expected


def test_a_process_has_what_it_has() -> None:
    with open("/proc/self/status", encoding="ascii") as status:
        fields = dict(line.split(":", 1) for line in status)
    effective = int(fields["CapEff"], 16)
    caller = Caller(os.geteuid(), os.getegid(), os.getpid())
    assert creds.keeps_suid(caller) == bool(effective >> 4 & 1)
    assert creds.sees_trusted(caller) == bool(effective >> 21 & 1)
