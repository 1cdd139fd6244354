"""Choose one of the two ways to mount, and mount.

"auto" prefers the kernel's overlay, which is faster and needs no process, and takes FUSE when the
kernel cannot do what the spec asks, or will not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from .errors import MountError, OptionError, TargetError, UnavailableError
from .fuse_mount import FuseMounter
from .mounter import Mounted, Mounter
from .native_overlay import NativeMounter
from .options import MountSpec, unsupported

Choice = Literal["auto", "native", "fuse"]


def mount(
    spec: MountSpec,
    target: bytes,
    backend: Choice = "auto",
    *,
    fuse: Mounter | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> Mounted:
    """Mount *spec* on *target*; return when it answers. Raises UnionFSError or OSError.

    *fuse* replaces the mounter for FUSE; *notice* hears why "auto" did not take the kernel.
    """
    fuse = fuse or FuseMounter()
    native = NativeMounter()
    if backend != "auto":
        return (fuse if backend == "fuse" else native).mount(spec, target)
    _refuse_hopeless(spec)
    reason = native.probe(spec)
    if reason is None:
        try:
            return native.mount(spec, target)
        except TargetError:
            raise
        except MountError as exc:
            reason = str(exc)
    fuse_reason = fuse.probe(spec)
    if fuse_reason is not None:
        raise UnavailableError(f"no backend can do this; native: {reason}; fuse: {fuse_reason}")
    notice(reason)
    return fuse.mount(spec, target)


def _refuse_hopeless(spec: MountSpec) -> None:
    """Raise OptionError when the options rule out both backends."""
    by_native, by_fuse = unsupported(spec, "native"), unsupported(spec, "fuse")
    if by_native and by_fuse:
        both = [reason for reason in by_native if reason in by_fuse]
        raise OptionError(both[0] if both else f"{by_native[0]}; but {by_fuse[0]}")
