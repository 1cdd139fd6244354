"""A private dockerd with the overlay2 driver, what it is made to store, and a record of that.

``fill()`` makes a daemon write a store with everything that a layer can hold; ``record()`` turns
the store, and what Docker says about its containers, into a value that JSON can carry, and
``replay()`` writes such a store again without Docker. The recorded one is
``tests/data/docker-20.10.json``; this writes it anew, as root::

    python -m tests.support.dockerd tests/data/docker-20.10.json
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

# /usr/local may have a newer client that does not talk to this daemon.
DAEMON: Final = Path("/usr/sbin/dockerd")
CLIENT: Final = Path("/usr/bin/docker")
BUSYBOX: Final = Path("/bin/busybox")

_START_S: Final = 30.0
_STOP_S: Final = 20.0
_INLINE_BYTES_MAX: Final = 256
# cap_net_raw and cap_net_bind_service, permitted and effective (struct vfs_cap_data)
_NET_RAW: Final = bytes.fromhex("0100000200200000000000000000000000000000")
_NET_BIND: Final = bytes.fromhex("0100000200040000000000000000000000000000")
_APPLETS: Final = "sh ls ln rm mkdir cat echo touch mv chmod chown mknod mkfifo sleep cp"

_DOCKERFILE: Final = """\
FROM base:1
RUN echo second >/etc/second && rm /data/gone && ln /etc/second /etc/second-link \
 && chmod 4755 /bin/capable
RUN rm -r /opaque && mkdir /opaque && echo new >/opaque/new && chown 12:34 /opaque/new
RUN mkdir -p /srv/long && touch "/srv/long/with space" && mkfifo /srv/pipe && mknod /srv/null c 1 3
COPY Dockerfile /etc/Dockerfile
RUN rm -r /data/deep && echo "now a file" >/data/deep && mv /data/one /data/moved
"""
_WORK: Final = """
echo run >/etc/run; rm /etc/base; rm -r /srv/long; mkdir /srv/long; echo x >>/data/two
ln /data/two /data/three; chmod 700 /tmp; cp -a /etc /etc2; echo back >/opaque/new
touch -d "2001-02-03 04:05:06" /etc/second; touch /ready; sleep 600
"""


@dataclass(frozen=True)
class Container:
    """What Docker says of a container: its layer, ``docker diff``, ``docker export``."""

    layer: str
    changes: tuple[str, ...]
    export: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class DockerStore:
    """A store that no daemon has open, and its containers by name."""

    home: Path
    containers: dict[str, Container]


# --- the daemon -----------------------------------------------------------------------------------


class Daemon:
    """A running dockerd below a directory of its own, without network and without registry."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.home = place / "root" / "overlay2"
        self._socket = f"unix://{place}/docker.sock"
        (place / "empty.json").write_text("{}", encoding="ascii")
        places = f"""--config-file {place}/empty.json --data-root {place}/root
            --exec-root {place}/exec -p {place}/pid -H {self._socket}"""
        network = """--iptables=false --ip6tables=false --ip-forward=false --ip-masq=false
            --bridge=none --userland-proxy=false"""
        other = "--oom-score-adjust=0 --exec-opt native.cgroupdriver=cgroupfs -s overlay2"
        with (place / "dockerd.log").open("wb") as log:
            self._process = subprocess.Popen(
                [DAEMON, *places.split(), *network.split(), *other.split()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                self("version")
                return
            except RuntimeError:
                if self._process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                log = (self.place / "dockerd.log").read_text(encoding="utf-8", errors="replace")
                self.stop()
                raise RuntimeError(f"dockerd does not start: {log[-2000:]}") from None

    def __call__(self, *arguments: str | Path, stdin: Path | None = None) -> str:
        """Output of ``docker ARGUMENTS``; RuntimeError with what it says when it fails."""
        with (stdin or Path(os.devnull)).open("rb") as source:
            done = subprocess.run(
                [CLIENT, "-H", self._socket, *arguments],
                stdin=source,
                capture_output=True,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DOCKER_BUILDKIT": "0"},
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"docker {arguments}: {done.stderr.decode(errors='replace')}")
        return done.stdout.decode()

    def stop(self) -> None:
        """End it as a shutdown does; its own containerd ends with it."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def running(place: Path) -> Iterator[Daemon]:
    """A daemon for the length of the block."""
    daemon = Daemon(place)
    try:
        yield daemon
    finally:
        daemon.stop()


def fill(daemon: Daemon) -> dict[str, Container]:
    """Import, build, run, change, commit, run again; what Docker says of the containers."""
    base = daemon.place / "base"
    _make_base(base)
    archive = daemon.place / "base.tar"
    pack = f"tar -C {base} --xattrs --xattrs-include=* -cf {archive} ."
    subprocess.run(pack.split(), check=True)
    daemon("import", "-", "base:1", stdin=archive)
    context = daemon.place / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(_DOCKERFILE, encoding="ascii")
    daemon("build", "--network", "none", "-t", "built:1", context)
    daemon("create", "--name", "still", "--network", "none", "built:1", "/bin/sh")
    offline = ("--network", "none")
    daemon("run", "-d", "--name", "busy", *offline, "built:1", "/bin/sh", "-c", _WORK)
    _change_from_outside(
        Path(daemon("inspect", "-f", "{{.GraphDriver.Data.MergedDir}}", "busy").strip())
    )
    daemon("commit", "busy", "committed:1")
    again = "rm /etc/run /bin/raw; mkdir /bin/raw; echo z >/bin/raw/z"
    daemon("run", "--name", "again", *offline, "committed:1", "/bin/sh", "-c", again)
    daemon("stop", "-t", "0", "busy")
    return {name: _look(daemon, name) for name in ("still", "busy", "again")}


def _make_base(root: Path) -> None:
    for name in ("bin", "etc", "data/deep", "tmp", "opaque", "root"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    for name in ("busybox", "capable"):
        shutil.copy(BUSYBOX, root / "bin" / name)
    os.setxattr(root / "bin" / "capable", "security.capability", _NET_RAW)
    for name in _APPLETS.split():
        (root / "bin" / name).symlink_to("busybox")
    texts = {
        "etc/base": "base", "etc/passwd": "root:x:0:0:root:/root:/bin/sh", "data/one": "one",
        "data/gone": "gone", "data/deep/file": "deep", "opaque/a": "a", "opaque/b": "b",
    }  # fmt: skip
    for name, text in texts.items():
        (root / name).write_text(f"{text}\n", encoding="ascii")
    os.link(root / "data" / "one", root / "data" / "two")
    (root / "etc" / "link").symlink_to("../data/one")


def _change_from_outside(merged: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not (merged / "ready").exists():
        assert time.monotonic() < deadline, "the container does not do its work"
        time.sleep(0.05)
    os.setxattr(merged / "etc" / "run", "user.origin", b"outside")
    shutil.copy(BUSYBOX, merged / "bin" / "raw")
    os.setxattr(merged / "bin" / "raw", "security.capability", _NET_BIND)


def _look(daemon: Daemon, name: str) -> Container:
    upper = daemon("inspect", "-f", "{{.GraphDriver.Data.UpperDir}}", name).strip()
    exported = daemon.place / f"{name}.tar"
    daemon("export", "-o", exported, name)
    changes = sorted(daemon("diff", name).splitlines())
    return Container(Path(upper).parent.name, tuple(changes), read_export(exported))


# --- what is recorded -----------------------------------------------------------------------------


def shortened(data: bytes) -> bytes:
    """*data*, or a digest in place of anything long: programs are not kept in this repository."""
    if len(data) <= _INLINE_BYTES_MAX:
        return data
    return b"sha256:" + hashlib.sha256(data).hexdigest().encode()


def read_export(archive: Path) -> dict[str, dict[str, Any]]:
    """Members of a ``docker export``, by path without leading "./" and trailing slash."""
    found: dict[str, dict[str, Any]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            node: dict[str, Any] = {
                "mode": stat.S_IMODE(member.mode),
                "uid": member.uid,
                "gid": member.gid,
                "mtime": int(member.mtime),
            }
            if member.isreg() or member.islnk():
                stream = tar.extractfile(member)
                assert stream is not None
                node["type"] = "file"
                node["data"] = _text(shortened(stream.read()))
            elif member.issym():
                node.update(type="symlink", target=member.linkname)
            else:
                node["type"] = {
                    tarfile.DIRTYPE: "dir", tarfile.CHRTYPE: "char", tarfile.FIFOTYPE: "fifo"
                }[member.type]  # fmt: skip
            found[member.name.rstrip("/")] = node
    return found


def _text(data: bytes) -> str:
    try:
        return "t:" + data.decode("ascii")
    except UnicodeDecodeError:
        return "b:" + base64.b64encode(data).decode()


def to_bytes(text: str) -> bytes:
    """Content as recorded."""
    return base64.b64decode(text[2:]) if text.startswith("b:") else text[2:].encode("ascii")


def record(store: DockerStore) -> dict[str, Any]:
    """Everything below the store's home, and the containers, as JSON can carry it."""
    nodes: dict[str, dict[str, Any]] = {}
    numbers: dict[int, str] = {}
    for directory, names, files in os.walk(store.home):
        for name in sorted([*names, *files]):
            full = Path(directory, name)
            path = str(full.relative_to(store.home))
            nodes[path] = _record_node(full, numbers.get(full.lstat().st_ino))
            numbers[full.lstat().st_ino] = path
    containers = {
        name: {"layer": one.layer, "changes": one.changes, "export": one.export}
        for name, one in store.containers.items()
    }
    home = stat.S_IMODE(store.home.stat().st_mode)
    return {"mode": home, "nodes": dict(sorted(nodes.items())), "containers": containers}


def _record_node(path: Path, same_as: str | None) -> dict[str, Any]:
    st = path.lstat()
    if same_as is not None:
        return {"type": "link", "target": same_as}
    keys = os.listxattr(path, follow_symlinks=False)
    node: dict[str, Any] = {
        "mode": stat.S_IMODE(st.st_mode), "uid": st.st_uid, "gid": st.st_gid,
        "mtime_ns": st.st_mtime_ns,
    }  # fmt: skip
    if keys:
        node["xattrs"] = {k: os.getxattr(path, k, follow_symlinks=False).hex() for k in keys}
    if stat.S_ISREG(st.st_mode):
        node.update(type="file", data=_text(shortened(path.read_bytes())))
    elif stat.S_ISLNK(st.st_mode):
        node.update(type="symlink", target=str(path.readlink()))
    elif stat.S_ISDIR(st.st_mode):
        node["type"] = "dir"
    elif stat.S_ISFIFO(st.st_mode):
        node["type"] = "fifo"
    else:
        assert stat.S_ISCHR(st.st_mode), path
        node.update(type="char", rdev=st.st_rdev)
    return node


def replay(recorded: dict[str, Any], home: Path) -> DockerStore:
    """Write a recorded store to *home*, which is made; modes, owners, times and marks as it was."""
    home.mkdir()
    home.chmod(recorded["mode"])
    nodes = recorded["nodes"]
    for path, node in nodes.items():
        if node["type"] != "link":
            _make_node(home / path, node)
    for path, node in nodes.items():
        if node["type"] == "link":
            os.link(home / node["target"], home / path, follow_symlinks=False)
    for path, node in sorted(nodes.items(), reverse=True):
        if node["type"] != "link":
            os.utime(home / path, ns=(node["mtime_ns"],) * 2, follow_symlinks=False)
    return DockerStore(
        home,
        {
            name: Container(one["layer"], tuple(one["changes"]), one["export"])
            for name, one in recorded["containers"].items()
        },
    )


def _make_node(path: Path, node: dict[str, Any]) -> None:
    if node["type"] == "dir":
        path.mkdir()
    elif node["type"] == "file":
        path.write_bytes(to_bytes(node["data"]))
    elif node["type"] == "symlink":
        path.symlink_to(node["target"])
    elif node["type"] == "fifo":
        os.mkfifo(path)
    else:
        os.mknod(path, stat.S_IFCHR, node["rdev"])
    os.chown(path, node["uid"], node["gid"], follow_symlinks=False)
    if node["type"] != "symlink":
        path.chmod(node["mode"])
    for key, value in node.get("xattrs", {}).items():
        os.setxattr(path, key, bytes.fromhex(value), follow_symlinks=False)


def main(target: Path) -> None:
    """Record a store of this machine's Docker."""
    with tempfile.TemporaryDirectory(prefix="unionfs2-docker-") as name:
        with running(Path(name)) as daemon:
            containers = fill(daemon)
            version = daemon("version", "-f", "{{.Server.Version}}").strip()
        recorded = record(DockerStore(daemon.home, containers))
    target.write_text(_by_lines({"docker": version, **recorded}, 3), encoding="ascii")


def _by_lines(value: Any, depth: int) -> str:
    """JSON with one line for each object below *depth* levels: short, and fit for a diff."""
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    items = (f"{json.dumps(key)}: {_by_lines(value[key], depth - 1)}" for key in sorted(value))
    return "{\n" + ",\n".join(items) + "\n}" + "\n" * (depth == 3)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
