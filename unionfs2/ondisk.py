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

# The layer store: Docker's overlay2 layout (HOME/<id>/{diff,link,lower,work,merged}, HOME/l/<short
# name> -> ../<id>/diff), and beside it what only this project writes.
LINKS_NAME: Final = b"l"
DIFF_NAME: Final = b"diff"
LINK_NAME: Final = b"link"
LOWER_NAME: Final = b"lower"
MERGED_NAME: Final = b"merged"
COMMITTED_NAME: Final = b"committed"  # Docker's newer versions mount such a layer read-only too
SHORT_NAME_LENGTH: Final = 26
SHORT_NAME_ALPHABET: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
LAYERS_MAX_DEFAULT: Final = 128
ID_BYTES_MAX: Final = 255  # NAME_MAX of every file system in use

# Modes of what the store makes. Group may enter, others may not: a setuid file inside a layer
# must not be within reach of ordinary users.
HOME_MODE: Final = 0o710
LAYER_MODE: Final = 0o710
DIFF_MODE: Final = 0o755
PRIVATE_MODE: Final = 0o700

# Private state of this project in a store. Ids never begin with a dot, so nothing can clash.
STORE_NAME: Final = b".unionfs2"
STORE_FORMAT_NAME: Final = b"format.json"
STORE_FORMAT_VERSION: Final = 1
STORE_LOCK_NAME: Final = b"lock"  # flock(2) on it; its content is the generation counter
STAGING_NAME: Final = b"staging"  # half-made layers, each directory locked by its maker
TRASH_NAME: Final = b"trash"  # removed layers until they are deleted
QUARANTINE_NAME: Final = b"quarantine"  # what repair took out of the store
REFERENCES_NAME: Final = b"references"  # who has mounted what, valid until the next boot
IMAGES_NAME: Final = b"images"
IMAGE_NAMES_NAME: Final = b"names.json"  # name -> image id, in the images directory
IMAGE_RECORD_NAME: Final = b"image.json"  # in images/<64 hex digits of the image id>/
IMAGE_MANIFEST_NAME: Final = b"manifest.json"  # exact bytes, when the image came with one
IMAGE_CONFIG_NAME: Final = b"config.json"  # exact bytes; their digest is the image id
IMAGE_RECORD_VERSION: Final = 1
EMPTY_NAME: Final = b"empty"  # an empty lower directory for mounts that need one more
# First line of the lock file: generation counter, boot id, BUSY while a change is under way.
STORE_LOCK_IDLE: Final = b"idle"
STORE_LOCK_BUSY: Final = b"busy"
# Inside a layer directory.
RECORD_NAME: Final = b"layer.json"
RECORD_VERSION: Final = 1
TAR_SPLIT_NAME: Final = b"tar-split"
# In a staged layer: the id of the layer whose place it takes, where names cannot be exchanged.
REPLACES_NAME: Final = b"replaces"
TEMP_SUFFIX: Final = b".tmp"  # "<name>.<16 hex digits>.tmp": a file on its way to being <name>
NOTE_SUFFIX: Final = b".txt"  # beside a quarantined object: what it was and why it is there

# Deletions in tar streams (OCI image-spec, layer.md, "Whiteouts"; AUFS names).
WHITEOUT_PREFIX: Final = b".wh."
WHITEOUT_META_PREFIX: Final = b".wh..wh."
WHITEOUT_OPAQUE: Final = b".wh..wh..opq"
