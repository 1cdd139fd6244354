"""``-o`` text <-> MountSpec: what to mount, as a value.

Pure: no system call, no look at a disk. Three rules hold here.

* Escaping is the kernel's (fs/overlayfs/params.c): a backslash takes the next byte literally, a
  bare ``,`` ends an option, a bare ``:`` separates lower layers and ``::`` starts data-only ones.
  Values of SELinux options may stand in double quotes instead, as mount(8) writes them.
* Every name is known (option_names.py): it fills a field of MountSpec, or is accepted without
  effect, or is refused; an unknown one is refused with the nearest known. Nothing is guessed.
* Invariant: ``parse_options(format_options(spec)).spec == spec`` for every spec with valid paths.

A spec says what is wanted, not who can do it: unsupported() tells what a backend must refuse.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

from . import transports
from .errors import OptionError, show
from .option_names import (
    CONTEXTS,
    FLAGS,
    IGNORED,
    LIMITS,
    MAPPINGS,
    MICROSECONDS,
    NUMBERS,
    PATHS,
    REFUSED,
    REFUSED_UNLESS,
    WORDS,
    known_names,
)
from .sizes import SIZE_MAX, format_size, parse_size

Backend = Literal["native", "fuse"]

#: Most lower layers, data-only ones included, that the kernel takes (OVL_MAX_STACK).
NATIVE_LOWER_MAX: Final = 500


class IdRange(NamedTuple):
    """One triple of uidmapping= or gidmapping=: *length* ids from *inner* are *outer* on disk."""

    inner: int
    outer: int
    length: int


class MountSpec(NamedTuple):
    """What to mount: layers, how they are used, and the generic flags of a mount.

    ``spec._replace(field=value)`` gives a changed copy. A named tuple, as other values that a start
    needs: loading dataclasses takes longer than mounting.

    Paths are bytes, absolute or relative to the current directory (see absolute()). The defaults
    are the profile that both backends share.
    """

    lower: tuple[bytes, ...] = ()  # topmost first
    upper: bytes | None = None
    work: bytes | None = None
    data: tuple[bytes, ...] = ()  # data-only layers, topmost first

    # how layers are read and written
    userxattr: bool | None = None  # None: False with CAP_SYS_ADMIN in the first user namespace
    volatile: bool = False  # no syncing at all, and a mark in the work directory
    fsync: str = "auto"  # auto | strict | off (off: as volatile, without the mark)
    exclusive: bool = False  # refuse, not only warn, when upper or work is in use
    acl: bool = True
    uuid: str = "auto"  # auto | on | off | null
    redirect_dir: str = "follow"  # on | off | follow | nofollow
    metacopy: bool = False
    index: bool = False  # type: ignore[assignment]  # as an option; hides a method of tuples
    nfs_export: bool = False
    xino: str = "off"  # off | auto | on
    verity: str = "off"  # off | on | require

    # what the upper directory may hold at most (see unionfs2/quota.py)
    quota_bytes: int | None = None
    quota_inodes: int | None = None

    # identities
    uidmapping: tuple[IdRange, ...] = ()
    gidmapping: tuple[IdRange, ...] = ()
    squash_to_root: bool = False
    squash_to_uid: int | None = None
    squash_to_gid: int | None = None
    xattr_permissions: int = 0

    # the mount itself
    read_only: bool = False
    nosuid: bool = False
    nodev: bool = False
    noexec: bool = False
    nosymfollow: bool = False
    atime: str = "relatime"  # relatime | noatime | strictatime
    nodiratime: bool = False
    sync: bool = False
    dirsync: bool = False
    allow_other: bool | None = None  # None: yes when privileged
    context: tuple[tuple[str, bytes], ...] = ()  # (option name, label), for the security module
    source: bytes = b"unionfs2"  # first column of /proc/self/mounts

    # the server process
    transport: str = "auto"  # auto | pyfuse3 | devfuse
    writeback: str = "auto"  # auto | on | off: whether the kernel holds writes back
    passthrough: bool = False  # the kernel reads and writes open files by itself
    busy_poll: int | None = None  # microseconds to look for a request before sleeping
    wakeful: str = "auto"  # auto | on | off: keep idle processors awake between close requests
    debug: bool = False
    log: bytes | None = None
    journal: bool = False
    auto_unmount: bool = False


class ParsedOptions(NamedTuple):
    """A spec, and the options that were accepted although they mean nothing here."""

    spec: MountSpec
    ignored: tuple[str, ...] = ()


# --- escaping -------------------------------------------------------------------------------------


def split_unescaped(text: bytes, separator: int) -> list[bytes]:
    """Cut *text* at each byte *separator* that no backslash precedes; escapes are kept."""
    parts: list[bytes] = []
    start = pos = 0
    while pos < len(text):
        if text[pos] == 0x5C:
            pos += 2
            continue
        if text[pos] == separator:
            parts.append(text[start:pos])
            start = pos + 1
        pos += 1
    parts.append(text[start:])
    return parts


def unescape(text: bytes) -> bytes:
    """Drop each backslash that takes the next byte literally, and a lone one at the end."""
    out = bytearray()
    pos = 0
    while pos < len(text):
        if text[pos] == 0x5C:
            pos += 1
            if pos == len(text):
                break
        out.append(text[pos])
        pos += 1
    return bytes(out)


def escape(path: bytes, special: bytes = b"\\,") -> bytes:
    """Put a backslash before each byte of *special* in *path*."""
    out = bytearray()
    for byte in path:
        if byte in special:
            out.append(0x5C)
        out.append(byte)
    return bytes(out)


def split_options(text: bytes) -> list[bytes]:
    """The elements of an ``-o`` text, empty ones left out, escapes and quotes still in place.

    A comma inside double quotes belongs to the value, but only for the options that carry a
    security label: in a path a double quote is an ordinary byte.
    """
    elements: list[bytes] = []
    open_quote: bytes | None = None
    for part in split_unescaped(text, 0x2C):
        if open_quote is None:
            open_quote = part if _opens_quote(part) else None
            if open_quote is None:
                elements.append(part)
            continue
        open_quote += b"," + part
        if part.endswith(b'"'):
            elements.append(open_quote)
            open_quote = None
    if open_quote is not None:
        raise OptionError(f'option "{show(open_quote)}" has no closing quote: add one')
    return [element for element in elements if element]


def _opens_quote(element: bytes) -> bool:
    name, equals, value = element.partition(b"=")
    if not equals or name.decode("ascii", "replace") not in CONTEXTS:
        return False
    return value.startswith(b'"') and not (len(value) > 1 and value.endswith(b'"'))


# --- text -> spec ---------------------------------------------------------------------------------


class _Draft:
    """What has been read so far: field values, the names seen, the names without effect."""

    def __init__(self, base: MountSpec) -> None:
        self.values: dict[str, object] = {}
        self.lower: list[bytes] = list(base.lower)
        self.data: list[bytes] = list(base.data)
        self.context: dict[str, bytes] = dict(base.context)
        self.seen: dict[str, bytes | None] = {}
        self.ignored: list[str] = []

    def finish(self, base: MountSpec) -> ParsedOptions:
        spec = base._replace(
            lower=tuple(self.lower),
            data=tuple(self.data),
            context=tuple(self.context.items()),
            **self.values,  # type: ignore[arg-type]  # FLAGS and WORDS hold each field's type
        )
        _check_contradictions(spec, self.seen)
        return ParsedOptions(spec, tuple(dict.fromkeys(self.ignored)))


def parse_options(text: bytes | Sequence[bytes], base: MountSpec | None = None) -> ParsedOptions:
    """Read ``-o`` text, or several texts in the order given, on top of *base*.

    Empty elements are skipped, a repeated option replaces the earlier one. Raises OptionError.
    """
    base = base or MountSpec()
    draft = _Draft(base)
    for piece in (text,) if isinstance(text, bytes) else text:
        for element in split_options(piece):
            raw_name, equals, value = element.partition(b"=")
            _apply(draft, show(raw_name), value if equals else None, element)
    return draft.finish(base)


def _apply(draft: _Draft, name: str, value: bytes | None, element: bytes) -> None:
    draft.seen[name] = value
    if name in FLAGS and value is None:
        field, setting = FLAGS[name]
        draft.values[field] = setting
    elif name in WORDS:
        _apply_word(draft, name, value)
    elif name in _VALUED:
        _VALUED[name](draft, name, _required(name, value))
    elif name in IGNORED or name.startswith(("x-", "X-")):
        draft.ignored.append(show(element))
    elif name in REFUSED:
        _apply_refused(draft, name, value, element)
    elif name in FLAGS:
        raise OptionError(f'option "{name}" takes no value, got "{show(element)}": write {name}')
    else:
        raise OptionError(_unknown(name))


def _required(name: str, value: bytes | None) -> bytes:
    if value is None:
        raise OptionError(f'option "{name}" needs a value: write {name}=VALUE')
    if b"\0" in value:
        raise OptionError(f'option "{name}" has a NUL byte in its value "{show(value)}": remove it')
    return value


def _unknown(name: str) -> str:
    import difflib  # noqa: PLC0415 - only a mistake pays for the import

    near = difflib.get_close_matches(name, known_names(), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "see --help for the list of options"
    return f'unknown option "{name}": {hint}'


def _apply_word(draft: _Draft, name: str, value: bytes | None) -> None:
    field, words = WORDS[name]
    word = show(_required(name, value))
    if (name, word) == ("fsync", "volatile"):  # the kernel's other spelling
        draft.values["volatile"] = True
        return
    if word not in words:
        choice = ", ".join(words) + (", volatile" if name == "fsync" else "")
        raise OptionError(f'option "{name}" cannot be "{word}": use one of {choice}')
    draft.values[field] = words[word]


def _apply_refused(draft: _Draft, name: str, value: bytes | None, element: bytes) -> None:
    if value is not None and show(value) in REFUSED_UNLESS.get(name, ()):
        draft.ignored.append(show(element))
        return
    raise OptionError(f'option "{show(element)}" is not supported: {REFUSED[name]}')


def _path(name: str, raw: bytes) -> bytes:
    path = unescape(raw)
    if not path:
        raise OptionError(f'option "{name}" has an empty path: give a directory')
    return path


def _set_path(draft: _Draft, name: str, value: bytes) -> None:
    draft.values[PATHS[name]] = _path(name, value)


def _set_source(draft: _Draft, name: str, value: bytes) -> None:
    draft.values["source"] = _path(name, value)


def _set_number(draft: _Draft, name: str, value: bytes) -> None:
    draft.values[name] = _number(name, value)


def _number(name: str, value: bytes) -> int:
    if not value.isdigit() or int(value) > 0xFFFFFFFE:
        raise OptionError(f'option "{name}" needs a number below 2^32-1, got "{show(value)}"')
    return int(value)


def _set_microseconds(draft: _Draft, name: str, value: bytes) -> None:
    most = MICROSECONDS[name]
    if not value.isdigit() or len(value) > 9 or int(value) > most:
        raise OptionError(
            f'option "{name}" needs microseconds from 0 (never) to {most}, got "{show(value)}"'
        )
    draft.values[name] = int(value)


def _set_limit(draft: _Draft, name: str, value: bytes) -> None:
    text = show(value)
    limit = parse_size(text, name) if name == "size" else _count(name, text)
    if not limit:
        raise OptionError(f'option "{name}" cannot be 0: leave it out for no limit')
    draft.values[LIMITS[name]] = limit


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 19 or int(text) > SIZE_MAX:
        raise OptionError(f'option "{name}" needs a number below 2^63, got "{text}"')
    return int(text)


def _set_mapping(draft: _Draft, name: str, value: bytes) -> None:
    # Container engines write a leading colon before the first triple.
    numbers = [_number(name, part) for part in value.removeprefix(b":").split(b":")]
    if len(numbers) % 3:
        raise OptionError(f'option "{name}" needs triples INNER:OUTER:COUNT, got "{show(value)}"')
    triples = zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    draft.values[name] = tuple(IdRange(*triple) for triple in triples)


def _set_context(draft: _Draft, name: str, value: bytes) -> None:
    quoted = len(value) > 1 and value.startswith(b'"') and value.endswith(b'"')
    draft.context[name] = value[1:-1] if quoted else unescape(value)


def _set_lowerdir(draft: _Draft, name: str, value: bytes) -> None:
    draft.lower, draft.data = _split_layers(name, value)


def _add_layer(draft: _Draft, name: str, value: bytes) -> None:
    target = draft.lower if name == "lowerdir+" else draft.data
    target.append(_path(name, value))


def _split_layers(name: str, value: bytes) -> tuple[list[bytes], list[bytes]]:
    """Read ``a:b::d::e`` as ([a, b], [d, e]); errors as the kernel's ovl_parse_layers()."""
    lower: list[bytes] = []
    data: list[bytes] = []
    target = lower
    parts = split_unescaped(value, 0x3A)
    after_double = False
    for index, part in enumerate(parts):
        if part:
            if target is data and not after_double:
                raise OptionError(
                    f'option "{name}" has an ordinary layer "{show(part)}" below data-only ones: '
                    "separate data-only layers by ::"
                )
            target.append(_path(name, part))
            after_double = False
        elif 0 < index < len(parts) - 1 and not after_double:
            target, after_double = data, True
        else:
            raise OptionError(
                f'option "{name}={show(value)}" has an empty layer: '
                "remove the extra colon, or write a colon of a name as \\:"
            )
    return lower, data


_VALUED: Final[dict[str, Callable[[_Draft, str, bytes], None]]] = {
    **dict.fromkeys(PATHS, _set_path),
    **dict.fromkeys(LIMITS, _set_limit),
    **dict.fromkeys(MICROSECONDS, _set_microseconds),
    **dict.fromkeys(NUMBERS, _set_number),
    **dict.fromkeys(MAPPINGS, _set_mapping),
    **dict.fromkeys(CONTEXTS, _set_context),
    "fsname": _set_source,
    "lowerdir": _set_lowerdir,
    "lowerdir+": _add_layer,
    "datadir+": _add_layer,
}


#: fs/fuse/passthrough.c: what the kernel passes on it cannot hold back.
_HELD_AND_PASSED: Final = "passthrough and writeback=on exclude each other: drop one of them"


def _check_contradictions(spec: MountSpec, seen: dict[str, bytes | None]) -> None:
    """Pairs the kernel answers with EINVAL (ovl_fs_params_verify), said in words.

    A default yields to an explicit option, so only what was written down can contradict.
    """
    redirect = f"redirect_dir={spec.redirect_dir}"
    if spec.metacopy and "redirect_dir" in seen and spec.redirect_dir != "on":
        raise OptionError(f"metacopy=on needs redirect_dir=on, got {redirect}: change one of them")
    if spec.nfs_export and "index" in seen and not spec.index:
        raise OptionError("nfs_export=on needs index=on, got index=off: change one of them")
    if spec.nfs_export and spec.metacopy:
        raise OptionError("nfs_export=on and metacopy=on exclude each other: drop one of them")
    if spec.userxattr and spec.redirect_dir == "on":
        raise OptionError("userxattr and redirect_dir=on exclude each other: drop one of them")
    if spec.userxattr and spec.metacopy:
        raise OptionError("userxattr and metacopy=on exclude each other: drop one of them")
    if spec.passthrough and spec.writeback == "on":
        raise OptionError(_HELD_AND_PASSED)


# --- spec -> text ---------------------------------------------------------------------------------

_FLAG_OF: Final[dict[tuple[str, object], str]] = {
    (field, value): name
    for name, (field, value) in reversed(FLAGS.items())  # the first name of a setting wins
}
_WORD_OF: Final[dict[str, dict[object, str]]] = {
    field: {value: f"{name}={word}" for word, value in reversed(words.items())}
    for name, (field, words) in WORDS.items()
}
_LIMIT_OF: Final = {field: name for name, field in LIMITS.items()}
_PATH_OF: Final = {field: name for name, field in PATHS.items()} | {"source": "fsname"}
_DEFAULT: Final = MountSpec()


def format_options(spec: MountSpec) -> bytes:
    """The canonical ``-o`` text of *spec*: layers first, then whatever is not the default."""
    out: list[bytes] = []
    if spec.lower:
        out.append(b"lowerdir=" + format_lowerdir(spec.lower, spec.data))
    else:
        out.extend(b"datadir+=" + escape(path) for path in spec.data)
    for name, value, default in zip(MountSpec._fields, spec, _DEFAULT, strict=True):
        if name not in {"lower", "data"} and value != default:
            out.extend(_format_field(name, value))
    return b",".join(out)


def format_lowerdir(lower: Sequence[bytes], data: Sequence[bytes] = ()) -> bytes:
    """The value of lowerdir=, escaped for text and for mount(2) alike."""
    joined = b":".join(escape(path, b"\\,:") for path in lower)
    return joined + b"".join(b"::" + escape(path, b"\\,:") for path in data)


def _format_field(name: str, value: object) -> list[bytes]:
    if name == "context":
        assert isinstance(value, tuple)
        return [f"{option}=".encode() + escape(label, b'\\,"') for option, label in value]
    if name in MAPPINGS:
        assert isinstance(value, tuple)
        return [f"{name}={':'.join(str(n) for triple in value for n in triple)}".encode()]
    if name in _LIMIT_OF:
        assert isinstance(value, int)
        text = format_size(value) if name == "quota_bytes" else str(value)
        return [f"{_LIMIT_OF[name]}={text}".encode()]
    if name in _WORD_OF:
        return [_WORD_OF[name][value].encode()]
    if isinstance(value, bytes):
        return [_PATH_OF[name].encode() + b"=" + escape(value)]
    flag = _FLAG_OF.get((name, value))
    return [(flag or f"{name}={value}").encode()]


# --- what to do with a spec -----------------------------------------------------------------------


def absolute(spec: MountSpec, cwd: bytes) -> MountSpec:
    """*spec* with every relative path counted from *cwd*; ``..`` stays, links may be in between."""

    def full(path: bytes | None) -> bytes | None:
        return None if path is None else os.path.join(cwd, path)

    return spec._replace(
        lower=tuple(os.path.join(cwd, path) for path in spec.lower),
        data=tuple(os.path.join(cwd, path) for path in spec.data),
        upper=full(spec.upper),
        work=full(spec.work),
        log=full(spec.log),
    )


_NATIVE_ONLY: Final[tuple[tuple[Callable[[MountSpec], object], str], ...]] = (
    (lambda s: s.redirect_dir == "on", "redirect_dir=on"),
    (lambda s: s.metacopy, "metacopy=on"),
    (lambda s: s.index, "index=on"),
    (lambda s: s.nfs_export, "nfs_export=on"),
    (lambda s: s.xino == "on", "xino=on"),
    (lambda s: s.verity != "off", "verity"),
    (lambda s: s.data, "data-only layers (:: in lowerdir)"),
)
_FUSE_ONLY: Final[tuple[tuple[Callable[[MountSpec], object], str], ...]] = (
    (lambda s: not s.acl, "noacl"),
    (lambda s: s.allow_other is False, "noallow_other"),
    (lambda s: s.transport != "auto", "transport="),
    (lambda s: s.passthrough, "passthrough"),
)
_DEVFUSE_ONLY: Final[tuple[tuple[Callable[[MountSpec], object], str], ...]] = (
    (lambda s: s.writeback == "on", "writeback=on"),
    (lambda s: s.passthrough, "passthrough"),
)
_NEITHER: Final[tuple[tuple[Callable[[MountSpec], object], str], ...]] = (
    (lambda s: s.uidmapping, "uidmapping="),
    (lambda s: s.gidmapping, "gidmapping="),
    (lambda s: s.squash_to_root, "squash_to_root"),
    (lambda s: s.squash_to_uid is not None, "squash_to_uid="),
    (lambda s: s.squash_to_gid is not None, "squash_to_gid="),
    (lambda s: s.xattr_permissions, "xattr_permissions="),
)


def unsupported(spec: MountSpec, backend: Backend) -> list[str]:
    """One sentence for each option of *spec* that *backend* cannot honour."""
    other, table = ("fuse", _FUSE_ONLY) if backend == "native" else ("native", _NATIVE_ONLY)
    found = []
    count = len(spec.lower) + len(spec.data)
    if backend == "native" and count > NATIVE_LOWER_MAX:
        found.append(
            f"the native backend takes at most {NATIVE_LOWER_MAX} lower layers, got {count}: "
            "merge some of them or use the fuse backend"
        )
    found += _unsupported_limits(spec, backend)
    found += _unsupported_transport(spec) if backend == "fuse" else []
    found += [
        f"the {backend} backend does not support {name}: leave it out or use the {other} backend"
        for applies, name in table
        if applies(spec)
    ]
    found += [
        f"{name} is not supported: leave it out" for applies, name in _NEITHER if applies(spec)
    ]
    return found


def _unsupported_limits(spec: MountSpec, backend: Backend) -> list[str]:
    names = [f"{name}=" for name, field in LIMITS.items() if getattr(spec, field) is not None]
    if not names:
        return []
    if backend == "native":
        which = " and ".join(names)
        reason = f"the native backend does not support {which}: the kernel's overlay counts nothing"
        return [f"{reason}, use the fuse backend, or a project quota on the upper directory"]
    if spec.upper is None:
        return [f"{' and '.join(names)} limits the upper directory: add upperdir= and workdir="]
    return []


def _unsupported_transport(spec: MountSpec) -> list[str]:
    refusal = transports.refusal(spec.transport)
    if refusal is not None:
        return [refusal]
    if transports.chosen(spec.transport) == "devfuse":
        return [_HELD_AND_PASSED] if spec.passthrough and spec.writeback == "on" else []
    return [
        f"the transport pyfuse3 does not support {name}: leave it out or use transport=devfuse"
        for applies, name in _DEVFUSE_ONLY
        if applies(spec)
    ]


def refuse_unsupported(spec: MountSpec, backend: Backend) -> None:
    """Raise OptionError with the first sentence of unsupported(), if there is one."""
    reasons = unsupported(spec, backend)
    if reasons:
        raise OptionError(reasons[0])
