"""Union mounts in the overlay on-disk format, through FUSE or through the kernel.

    from unionfs2 import MountSpec, mount, unmount

    spec = MountSpec(lower=(b"/layers/tools", b"/layers/base"), upper=b"/upper", work=b"/work")
    print(mount(spec, b"/merged").backend)      # "native" if the kernel can do it, else "fuse"
    unmount(b"/merged")

    with Driver.open("storage") as driver:      # layers, as container engines keep them
        box = driver.create(parent="base", writable=True)
        with driver.mounted(box) as root:
            (root / "hello").write_text("hi")

The public names are loaded at their first use: importing this package costs nothing, and neither
the core (UnionFS), the layer store (Driver) nor a mount through the kernel ever loads pyfuse3 or
trio; AsyncDriver is the driver for programs on trio.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unionfs2.backends import mount
    from unionfs2.driver import Driver
    from unionfs2.driver_trio import AsyncDriver
    from unionfs2.errors import UnionFSError
    from unionfs2.mounter import Mounted
    from unionfs2.mounts import list_mounts, unmount
    from unionfs2.options import MountSpec, format_options, parse_options
    from unionfs2.serving import serve
    from unionfs2.union import UnionFS

__version__ = "0.1.0"

__all__ = [
    "AsyncDriver",
    "Driver",
    "MountSpec",
    "Mounted",
    "UnionFS",
    "UnionFSError",
    "__version__",
    "format_options",
    "list_mounts",
    "mount",
    "parse_options",
    "serve",
    "unmount",
]

_HOME = {
    "AsyncDriver": "driver_trio",
    "Driver": "driver",
    "MountSpec": "options",
    "Mounted": "mounter",
    "UnionFS": "union",
    "UnionFSError": "errors",
    "format_options": "options",
    "list_mounts": "mounts",
    "mount": "backends",
    "parse_options": "options",
    "serve": "serving",
    "unmount": "mounts",
}


if not TYPE_CHECKING:  # a type checker that saw it would accept every name

    def __getattr__(name: str) -> object:
        """Load a public name from its module (PEP 562)."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module  # noqa: PLC0415 - a command has no need of it

        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
