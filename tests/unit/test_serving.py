"""Several mounts served by threads of one process, each with its own umask and ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("root", "fuse")

#: Two servers in threads; four processes that create at the same time, with ids and umasks of
#: their own; then the mode of what each has made. Prints one JSON object.
PROGRAM = """
import json, os, sys, threading
from unionfs2 import MountSpec, serve, unmount

root = sys.argv[1]
os.umask(0o027)
WHO = ((1001, 0o000), (1002, 0o077))
TIMES = 200

def start(name):
    spec = MountSpec(
        lower=(f"{root}/{name}-l".encode(),),
        upper=f"{root}/{name}-u".encode(),
        work=f"{root}/{name}-w".encode(),
        transport="devfuse",
    )
    answers = threading.Event()
    thread = threading.Thread(
        target=serve, args=(spec, f"{root}/{name}-m"),
        kwargs={"ready": lambda transport: answers.set()},
    )
    thread.start()
    assert answers.wait(30)
    return thread

def create(name, uid, umask):
    os.setgid(uid)
    os.setuid(uid)
    os.umask(umask)
    for number in range(TIMES):
        path = f"{root}/{name}-m/{uid}-{number}"
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(path + "d", 0o777)

servers = {name: start(name) for name in ("a", "b")}
children = []
for name in servers:
    for uid, umask in WHO:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                create(name, uid, umask)
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
statuses = [os.waitpid(pid, 0)[1] for pid in children]
seen = set()
for name in servers:
    for entry in os.scandir(f"{root}/{name}-u"):
        st = entry.stat(follow_symlinks=False)
        seen.add((entry.name.split("-")[0], st.st_uid, st.st_gid, oct(st.st_mode)))
counts = [len(os.listdir(f"{root}/{name}-m")) for name in servers]

unmount(f"{root}/a-m".encode())
servers["a"].join(30)
still = len(os.listdir(f"{root}/b-m"))
again = start("a")  # nothing of the first time is left: no lock, no descriptor
after = len(os.listdir(f"{root}/a-m"))
for name in servers:
    unmount(f"{root}/{name}-m".encode())
again.join(30)
servers["b"].join(30)
left = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2
        and os.path.exists(f"/proc/self/fd/{fd}")]
print(json.dumps({
    "statuses": statuses, "seen": sorted(seen), "counts": counts, "still": still, "after": after,
    "alive": [thread.name for thread in (again, *servers.values()) if thread.is_alive()],
    "umask": oct(os.umask(0)), "left": [path for path in left if path.startswith((root, "/dev/f"))],
}))
"""


def test_two_mounts_in_one_process_do_not_know_each_other(tmp_path: Path) -> None:
    for name in "ab":
        for part in "luwm":
            (tmp_path / f"{name}-{part}").mkdir(mode=0o755)
        (tmp_path / f"{name}-u").chmod(0o777)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    (tmp_path / "state").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, tmp_path],
        env={**os.environ, "UNIONFS2_STATE": str(tmp_path / "state")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert json.loads(done.stdout) == {
        "statuses": [0] * 4,
        "seen": [
            ["1001", 1001, 1001, oct(0o100666)],
            ["1001", 1001, 1001, oct(0o040777)],
            ["1002", 1002, 1002, oct(0o100600)],
            ["1002", 1002, 1002, oct(0o040700)],
        ],
        "counts": [800, 800],
        "still": 800,
        "after": 800,
        "alive": [],
        "umask": oct(0o027),
        "left": [],
    }
    assert list((tmp_path / "state").iterdir()) == []
