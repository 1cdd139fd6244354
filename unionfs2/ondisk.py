"""Every name, prefix, mark and limit that reaches a disk.

The format is the kernel's overlayfs (fs/overlayfs/overlayfs.h); readers of other modules look
nowhere else for a literal that ends up in a layer, an upper or a work directory.
"""

from __future__ import annotations

from typing import Final

# Work directory (fs/overlayfs/super.c: OVL_WORKDIR_NAME). The kernel owns these names; private
# state of this project would have to live beside them, never inside "work".
WORK_NAME: Final = b"work"
INDEX_NAME: Final = b"index"
INCOMPAT_NAME: Final = b"incompat"
VOLATILE_PARTS: Final = (b"incompat", b"volatile", b"dirty")
WORK_MODE: Final = 0o000

# Temporary names: "#" and lower-case hex, as ovl_tempname() in fs/overlayfs/dir.c.
TEMP_PREFIX: Final = b"#"

# Extended attributes: NS + "overlay." + suffix (fs/overlayfs/overlayfs.h, enum ovl_xattr).
TRUSTED_PREFIX: Final = b"trusted.overlay."
USER_PREFIX: Final = b"user.overlay."
SUFFIX_OPAQUE: Final = b"opaque"
SUFFIX_WHITEOUT: Final = b"whiteout"
SUFFIX_ORIGIN: Final = b"origin"
SUFFIX_IMPURE: Final = b"impure"
SUFFIX_REDIRECT: Final = b"redirect"
SUFFIX_METACOPY: Final = b"metacopy"
SUFFIX_NLINK: Final = b"nlink"
SUFFIX_UUID: Final = b"uuid"
SUFFIX_PROTATTR: Final = b"protattr"
# Between the prefix and an escaped name: "trusted.overlay.overlay.X" on disk is
# "trusted.overlay.X" in the merged view (nested overlays keep their marks).
ESCAPE: Final = b"overlay."

OPAQUE_YES: Final = b"y"
OPAQUE_XWHITEOUTS: Final = b"x"
IMPURE_YES: Final = b"y"

# Handle of a copied-up object's origin (struct ovl_fb).
FH_VERSION: Final = 0
FH_MAGIC: Final = 0xFB
FH_FLAG_BIG_ENDIAN: Final = 0x01
FH_FLAG_ANY_ENDIAN: Final = 0x02
FH_FLAG_PATH_UPPER: Final = 0x04
FH_FLAGS_KNOWN: Final = 0x07
FH_HEADER_BYTES: Final = 21
UUID_BYTES: Final = 16
UUID_NULL: Final = bytes(UUID_BYTES)

# POSIX ACL attributes (include/uapi/linux/xattr.h, posix_acl_xattr.h).
ACL_ACCESS: Final = b"system.posix_acl_access"
ACL_DEFAULT: Final = b"system.posix_acl_default"
CAPABILITY: Final = b"security.capability"
SECURITY_PREFIX: Final = b"security."
TRUSTED_NAMESPACE: Final = b"trusted."

# Longest path the kernel accepts in a redirect mark it writes itself.
REDIRECT_MAX: Final = 256
