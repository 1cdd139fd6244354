"""A transport of our own: the kernel's FUSE protocol over /dev/fuse, in Python.

``abi`` knows the layouts, ``codec`` turns bytes into values and back, ``session`` agrees on the
protocol, ``device`` reads and writes, ``door`` runs handlers, ``workers`` what takes long. The
handlers are in ``names``, ``attributes``, ``data`` and ``listing``; ``server`` puts all together.
"""

from .server import NAME, serve

__all__ = ["NAME", "serve"]
