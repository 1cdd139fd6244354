"""What an export of a layer needs from the layers below it.

A layer's own directory says everything about it with two exceptions. A directory that was renamed
(redirect mark) stands for content that lies below under another name: an export lists that
content under the new name. A file of which only the attributes were changed (metacopy mark) has
its data below.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .closing import Closing
from .errors import DamagedLayerError, show
from .nodes import Dir
from .treeview import MergedView, Seen, leave
from .whiteout import Dialect


@dataclass(slots=True)
class Exported:
    """One object as the merged view has it; *path* is relative to the root of the layer."""

    path: bytes
    seen: Seen

    @property
    def st(self) -> os.stat_result:
        return self.seen.st

    def readlink(self) -> bytes:
        return self.seen.readlink()

    def xattrs(self) -> dict[bytes, bytes]:
        return self.seen.xattrs()

    def open(self) -> int:
        return self.seen.open()


class LayerSource(Closing):
    """Merged content for the marks of one layer directory."""

    def __init__(self, view: MergedView) -> None:
        self._view = view
        self._last: tuple[bytes, Dir] = (b"", view.root)

    @classmethod
    def open(cls, top: bytes, lowers: Sequence[bytes], dialect: Dialect) -> LayerSource:
        """For the layer directory *top* over *lowers*, top-most first. Raises LayerError."""
        return cls(MergedView.open((top, *lowers), dialect))

    def close(self) -> None:
        self._view.close()

    def open_data(self, path: bytes) -> int:
        """A descriptor with the content of the file at *path*."""
        self._view.trim()
        try:
            return self._seen(path).open()
        except OSError as exc:
            raise DamagedLayerError(
                f"{show(path)} has no data of its own, and none is found in the layers below: "
                f"check the parent layers ({exc.strerror})"
            ) from exc

    def hides(self, path: bytes) -> bool:
        """Whether the layers below have a directory at *path* that the one of the layer hides."""
        view = self._view
        if len(view.root.lowers) < 2:
            return False
        return view.directory(path, view.without_top()) is not None

    def below(self, path: bytes) -> Iterator[Exported]:
        """Everything in the merged directory at *path*: parents first, names in byte order."""
        top = self._seen(path).dir
        if top is None:
            return
        view = self._view
        frames = [(path, top, view.names(top)[::-1])]
        while frames:
            view.trim()
            prefix, directory, names = frames[-1]
            if not names:
                frames.pop()
                leave(directory)
                continue
            name = names.pop()
            seen = view.look(directory, name)
            if seen is None:
                continue
            full = prefix + b"/" + name
            yield Exported(full, seen)
            if seen.dir is not None:
                frames.append((full, seen.dir, view.names(seen.dir)[::-1]))

    def _seen(self, path: bytes) -> Seen:
        """The object at *path*; the directory asked for last is remembered."""
        above, _, name = path.rpartition(b"/")
        if self._last[0] != above:
            directory = self._view.directory(above)
            if directory is None:
                raise FileNotFoundError(2, os.strerror(2), path)
            self._last = (above, directory)
        seen = self._view.look(self._last[1], name)
        if seen is None:
            raise FileNotFoundError(2, os.strerror(2), path)
        return seen
