"""Building blocks shared by the random generator and the catalogue: ACLs, capabilities, names."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

ACL_ACCESS: Final = b"system.posix_acl_access"
ACL_DEFAULT: Final = b"system.posix_acl_default"
CAPABILITY: Final = b"security.capability"

_UNDEFINED: Final = 0xFFFFFFFF


def acl(
    owner: int,
    group: int,
    other: int,
    *,
    users: tuple[tuple[int, int], ...] = (),
    groups: tuple[tuple[int, int], ...] = (),
    mask: int | None = None,
) -> bytes:
    """Value of a POSIX ACL attribute; a mask is added when named entries need one."""
    rows = [(0x01, owner, _UNDEFINED)]
    rows += [(0x02, perm, uid) for uid, perm in sorted(users)]
    rows.append((0x04, group, _UNDEFINED))
    rows += [(0x08, perm, gid) for gid, perm in sorted(groups)]
    if users or groups or mask is not None:
        rows.append((0x10, 7 if mask is None else mask, _UNDEFINED))
    rows.append((0x20, other, _UNDEFINED))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)


def capability(permitted: int) -> bytes:
    """Value of security.capability, revision 2, effective bit set."""
    return struct.pack("<IIIII", 0x02000001, permitted, 0, 0, 0)


#: Names which programs get wrong: longest, newline, not UTF-8, separators of mount options, space.
ODD_NAMES: Final = (
    b"n" * 255,
    b"new\nline",
    b"\xff\xfe\x80",
    b"co:lon,com\\ma",
    b" space ",
    b"#1f",
    b".wh.aufs",
    b"-rf",
)


class Dialect(NamedTuple):
    """What a mount allows: prefix of its private attributes, and what needs real privilege."""

    prefix: bytes = b"trusted.overlay."
    options: tuple[str, ...] = ()
    callers: tuple[str, ...] = ("root", "user", "other")
    devices: bool = True
    trusted: bool = True
    links: bool = True
    marked_directories: bool = True
    all_calls: bool = False  # also those that pyfuse3 has no handler for

    def on(self, transport: str) -> Dialect:
        """This dialect where *transport* serves the FUSE side."""
        return self._replace(all_calls=transport != "pyfuse3")


TRUSTED: Final = Dialect()
#: As root of a user namespace; devices and trusted attributes are not to be had there. No links:
#: without an origin the kernel takes two names of a copied-up file for two files sooner or later
#: (known difference "lost-identity").
USER_NAMESPACE: Final = Dialect(
    b"user.overlay.",
    ("userxattr",),
    devices=False,
    trusted=False,
    links=False,
    marked_directories=False,
)
#: As real root with option userxattr.
USERXATTR: Final = Dialect(b"user.overlay.", ("userxattr",), marked_directories=False)
