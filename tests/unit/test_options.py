from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs2 import transports
from unionfs2.errors import OptionError
from unionfs2.option_names import IGNORED, known_names
from unionfs2.options import (
    IdRange,
    MountSpec,
    absolute,
    escape,
    format_options,
    parse_options,
    refuse_unsupported,
    split_options,
    unescape,
    unsupported,
)
from unionfs2.sizes import SIZE_MAX

PODMAN = b"lowerdir=/h/l/AAA:/h/l/BBB,upperdir=/h/1/diff,workdir=/h/1/work"


def spec_of(text: bytes) -> MountSpec:
    return parse_options(text).spec


def refusal_of(text: bytes) -> str:
    """The sentence of the refusal, empty when the text is accepted."""
    try:
        parse_options(text)
    except OptionError as exc:
        return str(exc)
    return ""


# --- forms that callers really use ----------------------------------------------------------------


def test_layers_are_topmost_first() -> None:
    spec = spec_of(b"lowerdir=/top:/middle:/bottom,upperdir=/u,workdir=/w")
    assert spec.lower == (b"/top", b"/middle", b"/bottom")
    assert (spec.upper, spec.work) == (b"/u", b"/w")


@pytest.mark.parametrize("tail", [b",", b",,volatile", b",private", b",,fsync=0,volatile", b""])
def test_forms_of_podman(tail: bytes) -> None:
    spec = spec_of(PODMAN + tail)
    assert spec.lower == (b"/h/l/AAA", b"/h/l/BBB")
    assert spec.volatile is (b"volatile" in tail)
    assert spec.fsync == ("off" if b"fsync=0" in tail else "auto")


def test_containerd_appends_generic_flags() -> None:
    assert spec_of(b"workdir=/w,upperdir=/u,lowerdir=/l,dev,suid") == MountSpec(
        lower=(b"/l",), upper=b"/u", work=b"/w"
    )


def test_fstab_words_are_accepted_and_listed() -> None:
    parsed = parse_options(
        b"lowerdir=/l,defaults,noauto,user,_netdev,nofail,x-systemd.automount,comment=a b,X-mine=1"
    )
    assert parsed.ignored == (
        "defaults",
        "noauto",
        "user",
        "_netdev",
        "nofail",
        "x-systemd.automount",
        "comment=a b",
        "X-mine=1",
    )
    assert parsed.spec == MountSpec(lower=(b"/l",))


def test_generic_flags() -> None:
    spec = spec_of(b"lowerdir=/l,ro,nosuid,nodev,noexec,noatime,nodiratime,sync,dirsync")
    assert spec == MountSpec(
        lower=(b"/l",),
        read_only=True,
        nosuid=True,
        nodev=True,
        noexec=True,
        atime="noatime",
        nodiratime=True,
        sync=True,
        dirsync=True,
    )
    assert spec_of(b"ro,rw,nosuid,suid,noatime,relatime,sync,async") == MountSpec()


def test_mappings_may_begin_with_a_colon() -> None:
    spec = spec_of(b"lowerdir=/l,uidmapping=:0:1:1001:1001:0:1,gidmapping=0:1:5000")
    assert spec.uidmapping == (IdRange(0, 1, 1001), IdRange(1001, 0, 1))
    assert spec.gidmapping == (IdRange(0, 1, 5000),)


@pytest.mark.parametrize(
    "text",
    [b'context="a,b:c0,c1",ro', b"context=a\\,b:c0\\,c1,ro", b'ro,context="a,b:c0,c1"'],
)
def test_security_labels_may_be_quoted(text: bytes) -> None:
    spec = spec_of(text)
    assert spec.context == (("context", b"a,b:c0,c1"),)
    assert spec.read_only


def test_a_quote_in_a_path_is_an_ordinary_byte() -> None:
    assert spec_of(b'lowerdir="/a:/b",ro').lower == (b'"/a', b'/b"')


def test_repeated_options_replace_and_several_texts_add_up() -> None:
    parsed = parse_options([b"lowerdir=/a:/b,ro", b"lowerdir=/c,rw", b"upperdir=/u"])
    assert parsed.spec == MountSpec(lower=(b"/c",), upper=b"/u")


def test_layers_one_by_one() -> None:
    spec = spec_of(b"lowerdir+=/a:x,lowerdir+=/b\\,y,datadir+=/d")
    assert (spec.lower, spec.data) == ((b"/a:x", b"/b,y"), (b"/d",))


def test_limits_of_the_upper() -> None:
    spec = spec_of(b"lowerdir=/l,upperdir=/u,workdir=/w,size=1.5GiB,inodes=1000")
    assert (spec.quota_bytes, spec.quota_inodes) == (3 << 29, 1000)
    assert format_options(spec).endswith(b",size=1536M,inodes=1000")
    assert unsupported(spec, "fuse") == []


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (b"transport=devfuse", {"transport": "devfuse"}),
        (b"transport=pyfuse3,transport=auto", {}),
        (b"writeback", {"writeback": "on"}),
        (b"writeback=1", {"writeback": "on"}),
        (b"writeback=0", {"writeback": "off"}),
        (b"writeback,writeback=auto", {}),
        (b"passthrough", {"passthrough": True}),
        (b"passthrough=on,passthrough=off", {}),
        (b"busy_poll=0", {"busy_poll": 0}),
        (b"busy_poll=10000", {"busy_poll": 10_000}),
        (b"wakeful=off", {"wakeful": "off"}),
        (b"wakeful=on,wakeful=auto", {}),
    ],
)
def test_how_a_server_works(text: bytes, fields: dict[str, Any]) -> None:
    assert spec_of(b"lowerdir=/l," + text) == MountSpec(lower=(b"/l",), **fields)


def test_settings_of_a_server_mean_nothing_to_the_kernels_overlay() -> None:
    assert unsupported(spec_of(b"writeback=1,busy_poll=100,wakeful=on"), "native") == []


def test_a_transport_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "SERVED", ("pyfuse3",))
    assert transports.chosen("auto") == "pyfuse3"
    with pytest.raises(OptionError, match="transport=devfuse is not part of this version"):
        refuse_unsupported(spec_of(b"transport=devfuse,passthrough"), "fuse")


def test_auto_takes_the_first_transport_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "SERVED", ("devfuse", "pyfuse3"))
    assert transports.chosen("auto") == "devfuse"
    assert transports.chosen("pyfuse3") == "pyfuse3"
    assert unsupported(spec_of(b"writeback"), "fuse") == []
    assert unsupported(spec_of(b"passthrough,transport=devfuse"), "fuse") == []
    both = MountSpec(passthrough=True, writeback="on")  # made in a program, not parsed
    assert "exclude" in unsupported(both, "fuse")[0]


def test_fsync_volatile_is_volatile() -> None:
    assert spec_of(b"fsync=volatile").volatile
    assert spec_of(b"volatile,fsync=0").volatile


# --- escaping, as the kernel reads it -------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lower", "data"),
    [
        (b"lowerdir=/a\\:x:/b", (b"/a:x", b"/b"), ()),
        (b"lowerdir=/a\\,x:/b", (b"/a,x", b"/b"), ()),
        (b"lowerdir=/a\\\\:/b", (b"/a\\", b"/b"), ()),
        (b"lowerdir=/a\\q:/b\\", (b"/aq", b"/b"), ()),
        (b"lowerdir=/a b\n=#\xff:/b", (b"/a b\n=#\xff", b"/b"), ()),
        (b"lowerdir=/a::/d::/e", (b"/a",), (b"/d", b"/e")),
        (b"lowerdir=/a:/b::/d", (b"/a", b"/b"), (b"/d",)),
        (b"lowerdir=/a\\::/b", (b"/a:", b"/b"), ()),
    ],
)
def test_lowerdir(text: bytes, lower: tuple[bytes, ...], data: tuple[bytes, ...]) -> None:
    spec = spec_of(text)
    assert (spec.lower, spec.data) == (lower, data)


def test_upper_and_work_take_plain_colons() -> None:
    spec = spec_of(b"upperdir=/u:1\\,2,workdir=/w:\\\\")
    assert (spec.upper, spec.work) == (b"/u:1,2", b"/w:\\")


@pytest.mark.parametrize(
    "value", [b":/a", b"/a:", b"/a:::/b", b"", b"::/a", b"/a::", b"/a::/d:/e", b":"]
)
def test_stray_colons_are_refused(value: bytes) -> None:
    with pytest.raises(OptionError, match="layer"):
        parse_options(b"lowerdir=" + value)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"lowrdir=/a", "did you mean lowerdir"),
        (b"lowerdirs=/a", "did you mean lowerdir"),
        (b"upper=/a", "did you mean upperdir"),
        (b"volatil", "did you mean volatile"),
        (b"zzzz", "--help"),
        (b"=x", 'unknown option ""'),
        (b"upperdir", "upperdir=VALUE"),
        (b"upperdir=", "empty path"),
        (b"upperdir=/a\0b", "NUL"),
        (b"ro=1", "takes no value"),
        (b"metacopy=yes", "one of on, off"),
        (b"metacopy", "metacopy=VALUE"),
        (b"fsync=2", "volatile"),
        (b"squash_to_uid=root", "number"),
        (b"squash_to_uid=4294967295", "number"),
        (b"uidmapping=0:1", "triples"),
        (b"uidmapping=0:1:x", "number"),
        (b'context="never closed', "closing quote"),
        (b"remount,ro", "unmount and mount again"),
        (b"allow_root", "allow_other"),
        (b"plugins=/x", "lowerdir"),
        (b"noxattrs=1", "extended attributes"),
        (b"metacopy=on,redirect_dir=follow", "redirect_dir=on"),
        (b"nfs_export=on,index=off", "index=on"),
        (b"nfs_export=on,metacopy=on", "exclude"),
        (b"userxattr,metacopy=on", "exclude"),
        (b"userxattr,redirect_dir=on", "exclude"),
        (b"size=ten", "not a size"),
        (b"size=-1G", "cannot be negative"),
        (b"size=9000P", "too large"),
        (b"size=0", "cannot be 0"),
        (b"size=", "not a size"),
        (b"size", "needs a value"),
        (b"inodes=1k", "needs a number"),
        (b"inodes=9223372036854775808", "needs a number"),
        (b"inodes=0", "cannot be 0"),
        (b"transport=libfuse", "use one of auto, pyfuse3, devfuse"),
        (b"transport", "transport=VALUE"),
        (b"writeback=yes", "use one of auto, on, off"),
        (b"passthrough=auto", "use one of on, off"),
        (b"passthrough,writeback", "exclude"),
        (b"wakeful", "wakeful=VALUE"),
        (b"wakeful=yes", "use one of auto, on, off"),
        (b"busy_poll=10001", "from 0 (never) to 10000"),
        (b"busy_poll=-1", "from 0 (never) to 10000"),
        (b"busy_poll=1ms", "from 0 (never) to 10000"),
        (b"busy_poll", "needs a value"),
    ],
)
def test_refused_in_words(text: bytes, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options(text)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message


def test_a_value_that_asks_for_nothing_is_accepted() -> None:
    assert parse_options(b"noxattrs=0,plugins=").ignored == ("noxattrs=0", "plugins=")


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_every_ignored_name_is_accepted(name: str) -> None:
    parsed = parse_options(f"{name},lowerdir=/a".encode())
    assert parsed.ignored == (name,)
    assert IGNORED[name]


def test_every_known_name_is_parsed_or_refused_on_purpose() -> None:
    for name in known_names():
        for text in (name, f"{name}=on", f"{name}=1"):
            assert "unknown option" not in refusal_of(text.encode())


@pytest.mark.parametrize(
    ("text", "backend", "words"),
    [
        (b"redirect_dir=on", "fuse", "redirect_dir=on"),
        (b"metacopy=on", "fuse", "metacopy=on"),
        (b"index=on", "fuse", "index=on"),
        (b"nfs_export=on", "fuse", "nfs_export=on"),
        (b"lowerdir=/a::/b", "fuse", "data-only"),
        (b"noacl", "native", "noacl"),
        (b"uidmapping=0:1:2", "fuse", "uidmapping"),
        (b"uidmapping=0:1:2", "native", "uidmapping"),
        (b"gidmapping=0:1:2", "fuse", "gidmapping"),
        (b"squash_to_root", "fuse", "squash_to_root"),
        (b"squash_to_uid=0", "fuse", "squash_to_uid"),
        (b"xattr_permissions=2", "fuse", "xattr_permissions"),
        (b"size=1G,upperdir=/u", "native", "size=: .*use the fuse backend"),
        (b"inodes=9", "native", "inodes="),
        (b"size=1G,inodes=9", "native", "size= and inodes="),
        (b"inodes=9", "fuse", "upperdir="),
        (b"transport=pyfuse3", "native", "transport=: .*use the fuse backend"),
        (b"passthrough", "native", "passthrough: .*use the fuse backend"),
        (b"transport=pyfuse3,writeback", "fuse", "writeback=on: .*use transport=devfuse"),
        (b"transport=pyfuse3,passthrough", "fuse", "passthrough: .*use transport=devfuse"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_by_it(text: bytes, backend: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        refuse_unsupported(spec_of(text), backend)  # type: ignore[arg-type]


def test_the_default_profile_is_supported_by_both() -> None:
    spec = spec_of(PODMAN + b",volatile,userxattr,noatime,ro,exclusive,redirect_dir=off")
    assert unsupported(spec, "fuse") == unsupported(spec, "native") == []


# --- properties -----------------------------------------------------------------------------------

_PATH = st.binary(min_size=1, max_size=40).filter(lambda path: b"\0" not in path)
_NASTY = st.text('a:,\\" =\n\u00fc', min_size=1, max_size=12).map(str.encode)
_ANY_PATH = _PATH | _NASTY
_ID = st.integers(0, 0xFFFFFFFE)
_RANGES = st.lists(st.builds(IdRange, _ID, _ID, _ID), max_size=3).map(tuple)
_OPTIONAL_BOOL = st.none() | st.booleans()


@st.composite
def _specs(draw: st.DrawFn) -> MountSpec:
    spec = MountSpec(
        lower=tuple(draw(st.lists(_ANY_PATH, max_size=5))),
        data=tuple(draw(st.lists(_ANY_PATH, max_size=3))),
        upper=draw(st.none() | _ANY_PATH),
        work=draw(st.none() | _ANY_PATH),
        userxattr=draw(_OPTIONAL_BOOL),
        volatile=draw(st.booleans()),
        fsync=draw(st.sampled_from(["auto", "strict", "off"])),
        exclusive=draw(st.booleans()),
        acl=draw(st.booleans()),
        uuid=draw(st.sampled_from(["auto", "on", "off", "null"])),
        xino=draw(st.sampled_from(["off", "auto", "on"])),
        verity=draw(st.sampled_from(["off", "on", "require"])),
        redirect_dir=draw(st.sampled_from(["off", "follow", "nofollow"])),
        index=draw(st.booleans()),
        uidmapping=draw(_RANGES),
        gidmapping=draw(_RANGES),
        quota_bytes=draw(st.none() | st.integers(1, SIZE_MAX)),
        quota_inodes=draw(st.none() | st.integers(1, SIZE_MAX)),
        squash_to_root=draw(st.booleans()),
        squash_to_uid=draw(st.none() | _ID),
        squash_to_gid=draw(st.none() | _ID),
        xattr_permissions=draw(st.integers(0, 2)),
        read_only=draw(st.booleans()),
        nosuid=draw(st.booleans()),
        nodev=draw(st.booleans()),
        noexec=draw(st.booleans()),
        nosymfollow=draw(st.booleans()),
        atime=draw(st.sampled_from(["relatime", "noatime", "strictatime"])),
        nodiratime=draw(st.booleans()),
        sync=draw(st.booleans()),
        dirsync=draw(st.booleans()),
        allow_other=draw(_OPTIONAL_BOOL),
        context=tuple(
            draw(st.dictionaries(st.sampled_from(["context", "rootcontext"]), _PATH)).items()
        ),
        source=draw(_ANY_PATH),
        transport=draw(st.sampled_from(["auto", "pyfuse3", "devfuse"])),
        writeback=draw(st.sampled_from(["auto", "off"])),
        busy_poll=draw(st.none() | st.integers(0, 10_000)),
        debug=draw(st.booleans()),
        log=draw(st.none() | _ANY_PATH),
        journal=draw(st.booleans()),
        auto_unmount=draw(st.booleans()),
    )
    if not spec.userxattr and draw(st.booleans()):
        spec = spec._replace(metacopy=True, redirect_dir="on")
    if draw(st.booleans()):
        spec = spec._replace(writeback="on")
    elif draw(st.booleans()):
        spec = spec._replace(passthrough=True)
    return spec


@given(_specs())
def test_a_spec_survives_being_written_and_read(spec: MountSpec) -> None:
    text = format_options(spec)
    assert spec_of(text) == spec
    assert spec_of(b"," + text + b",,") == spec


@given(_ANY_PATH)
def test_escaping_is_undone(path: bytes) -> None:
    assert unescape(escape(path)) == path
    assert split_options(b"upperdir=" + escape(path) + b",ro") == [
        b"upperdir=" + escape(path),
        b"ro",
    ]


@given(st.binary(max_size=60))
def test_any_bytes_are_parsed_or_refused_in_one_line(text: bytes) -> None:
    assert "\n" not in refusal_of(text)


@given(st.text('lowerdi=:,\\/ab"', max_size=60).map(str.encode))
def test_what_is_parsed_is_stable(text: bytes) -> None:
    try:
        spec = spec_of(text)
    except OptionError:
        return
    assert spec_of(format_options(spec)) == spec


def test_relative_paths_count_from_a_directory() -> None:
    spec = MountSpec(lower=(b"a", b"/b"), upper=b"../u", work=b"w", data=(b"d",), log=b"l")
    assert absolute(spec, b"/here") == MountSpec(
        lower=(b"/here/a", b"/b"),
        upper=b"/here/../u",
        work=b"/here/w",
        data=(b"/here/d",),
        log=b"/here/l",
    )


def test_importing_options_and_the_native_mounter_loads_neither_pyfuse3_nor_trio() -> None:
    program = (
        "import sys, unionfs2, unionfs2.options, unionfs2.native_overlay, unionfs2.cli.fuse\n"
        "import unionfs2.fuse_mount, unionfs2.cli.forked\n"
        "heavy = {'pyfuse3', 'trio', 'logging', 'argparse'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
