"""What this process is allowed to do: its capabilities, and in whose user namespace they count."""

from __future__ import annotations

from typing import Final

CAP_DAC_OVERRIDE: Final = 1
CAP_SYS_ADMIN: Final = 21

_ALL_IDS: Final = 0xFFFFFFFF


def has_capability(number: int) -> bool:
    """Whether capability *number* is effective, in whatever user namespace this is."""
    try:
        with open("/proc/self/status", "rb") as status:
            for line in status:
                if line.startswith(b"CapEff:"):
                    return bool(int(line.split()[1], 16) >> number & 1)
    except OSError:
        pass
    return False


def in_initial_user_namespace() -> bool:
    """Whether every id maps to itself, which is how the first user namespace looks.

    A namespace with that very map could be made by the first root only, and would behave alike.
    """
    try:
        with open("/proc/self/uid_map", "rb") as uid_map:
            fields = [int(field) for field in uid_map.read().split()]
    except OSError:
        return False
    return fields == [0, 0, _ALL_IDS]


def has_initial_capability(number: int) -> bool:
    """Whether capability *number* is effective towards the whole machine."""
    return has_capability(number) and in_initial_user_namespace()


def may_mount() -> bool:
    """CAP_SYS_ADMIN here: mount(2) may be tried, also by the root of a user namespace."""
    return has_capability(CAP_SYS_ADMIN)


def default_userxattr() -> bool:
    """Whether marks go to user.overlay.*: yes where trusted.* cannot be written."""
    return not has_initial_capability(CAP_SYS_ADMIN)
