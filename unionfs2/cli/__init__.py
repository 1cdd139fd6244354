"""The commands ``unionfs2`` and ``fuse-unionfs2``."""
