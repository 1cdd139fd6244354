"""Every name that may stand in an ``-o`` text, and what becomes of it.

A name fills a field of MountSpec (FLAGS, WORDS and the like), is accepted without effect
(IGNORED), or is known and refused with the way out (REFUSED). What stands in none of these tables
is a mistake.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from . import transports

# Generic flags of mount(8): field and value.
FLAGS: Final[dict[str, tuple[str, object]]] = {
    "ro": ("read_only", True),
    "rw": ("read_only", False),
    "suid": ("nosuid", False),
    "nosuid": ("nosuid", True),
    "dev": ("nodev", False),
    "nodev": ("nodev", True),
    "exec": ("noexec", False),
    "noexec": ("noexec", True),
    "symfollow": ("nosymfollow", False),
    "nosymfollow": ("nosymfollow", True),
    "atime": ("atime", "relatime"),
    "noatime": ("atime", "noatime"),
    "relatime": ("atime", "relatime"),
    "norelatime": ("atime", "relatime"),  # the kernel has had no other default since 2.6.30
    "strictatime": ("atime", "strictatime"),
    "nostrictatime": ("atime", "relatime"),
    "diratime": ("nodiratime", False),
    "nodiratime": ("nodiratime", True),
    "sync": ("sync", True),
    "async": ("sync", False),
    "dirsync": ("dirsync", True),
    # our own, and those of overlay and FUSE that take no value
    "userxattr": ("userxattr", True),
    "nouserxattr": ("userxattr", False),
    "volatile": ("volatile", True),
    "exclusive": ("exclusive", True),
    "acl": ("acl", True),
    "noacl": ("acl", False),
    "squash_to_root": ("squash_to_root", True),
    "allow_other": ("allow_other", True),
    "noallow_other": ("allow_other", False),
    "debug": ("debug", True),
    "journal": ("journal", True),
    "auto_unmount": ("auto_unmount", True),
    "writeback": ("writeback", "on"),
    "passthrough": ("passthrough", True),
}

# Options with a word for a value: field, then word -> value.
_ON_OFF: Final[dict[str, object]] = {"on": True, "off": False}
WORDS: Final[dict[str, tuple[str, dict[str, object]]]] = {
    "uuid": ("uuid", {word: word for word in ("auto", "on", "off", "null")}),
    "redirect_dir": ("redirect_dir", {word: word for word in ("on", "off", "follow", "nofollow")}),
    "metacopy": ("metacopy", _ON_OFF),
    "index": ("index", _ON_OFF),
    "nfs_export": ("nfs_export", _ON_OFF),
    "xino": ("xino", {word: word for word in ("off", "auto", "on")}),
    "verity": ("verity", {word: word for word in ("off", "on", "require")}),
    "fsync": (
        "fsync",
        {"auto": "auto", "1": "auto", "strict": "strict", "0": "off", "off": "off"},
    ),
    "transport": ("transport", {word: word for word in ("auto", *transports.NAMES)}),
    # fuse-overlayfs writes a number
    "writeback": (
        "writeback",
        {"auto": "auto", "on": "on", "off": "off", "1": "on", "0": "off"},
    ),
    "passthrough": ("passthrough", _ON_OFF),
    "wakeful": ("wakeful", {word: word for word in ("auto", "on", "off")}),
}

# What the upper directory may grow to: field of each, in bytes and in objects.
LIMITS: Final = {"size": "quota_bytes", "inodes": "quota_inodes"}
#: Times in microseconds: the most each may be.
MICROSECONDS: Final = {"busy_poll": 10_000}
NUMBERS: Final = ("squash_to_uid", "squash_to_gid", "xattr_permissions")
MAPPINGS: Final = ("uidmapping", "gidmapping")
PATHS: Final = {"upperdir": "upper", "workdir": "work", "log": "log"}
CONTEXTS: Final = ("context", "fscontext", "defcontext", "rootcontext")

#: Accepted without effect: name -> why there is nothing to do. Peers and mount(8) know them.
IGNORED: Final[dict[str, str]] = {
    # fstab and mount(8); the program that reads fstab acts on them
    "defaults": "the defaults are in force anyway",
    "auto": "for fstab readers",
    "noauto": "for fstab readers",
    "nofail": "for fstab readers",
    "user": "for mount(8)",
    "nouser": "for mount(8)",
    "users": "for mount(8)",
    "nousers": "for mount(8)",
    "owner": "for mount(8)",
    "noowner": "for mount(8)",
    "group": "for mount(8)",
    "nogroup": "for mount(8)",
    "_netdev": "for fstab readers",
    "comment": "a comment",
    "helper": "for umount(8)",
    "uhelper": "for umount(8)",
    "silent": "messages are errors here",
    "loud": "messages are errors here",
    "mand": "no kernel has mandatory locks any more",
    "nomand": "no kernel has mandatory locks any more",
    "iversion": "for local file systems",
    "noiversion": "for local file systems",
    "lazytime": "times are kept by the file system below",
    "nolazytime": "times are kept by the file system below",
    # container engines
    "private": "propagation is the engine's business",
    # FUSE file systems in general
    "default_permissions": "always on",
    "subtype": "the type is always fuse.unionfs2",
    "nonempty": "a mount point may always have content",
    "big_writes": "always on",
    "clone_fd": "tuning of libfuse's own loop",
    "max_idle_threads": "tuning of libfuse's own loop",
    "max_threads": "tuning of libfuse's own loop",
    # fuse-overlayfs
    "threaded": "tuning of a loop that is not ours",
    "fast_ino": "inode numbers are always right and cheap",
    "timeout": "caching is chosen by the server",
    "static_nlink": "link counts cost nothing here",
    # kernel overlay
    "override_creds": "always on",
}

# Known to a peer, meaning something, and done by neither backend: name -> the way out.
REFUSED: Final[dict[str, str]] = {
    "remount": "unmount and mount again with the new options",
    "bind": "use mount --bind on the mounted tree",
    "rbind": "use mount --rbind on the mounted tree",
    "move": "use mount --move on the mounted tree",
    "allow_root": "use allow_other, permissions are checked by the kernel",
    "nooverride_creds": "layers are always accessed with the credentials of the mounter",
    "plugins": "list every layer in lowerdir=",
    "noxattrs": "leave it out, extended attributes are always passed through",
    "uid": "use squash_to_uid=",
    "gid": "use squash_to_gid=",
    "umask": "set the modes in the layers",
}

# Refused unless the value says "no", in which case there is nothing to do.
REFUSED_UNLESS: Final = {"noxattrs": ("0",), "plugins": ("",)}

LAYER_NAMES: Final = ("lowerdir", "lowerdir+", "datadir+", *PATHS, "fsname")


def known_names() -> list[str]:
    """Every option name that parse_options() has an opinion on, sorted."""
    groups: Iterable[Iterable[str]] = (
        FLAGS,
        WORDS,
        LIMITS,
        MICROSECONDS,
        NUMBERS,
        MAPPINGS,
        LAYER_NAMES,
        CONTEXTS,
        IGNORED,
        REFUSED,
    )
    return sorted({name for group in groups for name in group})
