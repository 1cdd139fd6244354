"""The second half of ``./dev demo``: the same root file system as an image in a layer store.

Everything is done with the command ``unionfs2``, as a person would: the layers are applied, worked
on and committed, made an image, exported, imported into a second store, exported again with equal
digests, mounted through FUSE, changed, committed, and mounted by the kernel with the same view.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Final

from devtools.demo_rig import (
    UNIONFS2,
    DemoError,
    Place,
    Times,
    compare,
    console,
    read_view,
    run,
    run_inside,
)
from tests.support.tree import differences

IMAGE: Final = "debian-demo:1"

# Layers that are made by working on a mount: (id, backend, what it shows, script for sh -e).
STEPS: Final = (
    (
        "site",
        "fuse",
        "a site's own files, some deleted and a directory replaced",
        """
        echo 'Welcome to the third layer.' >/etc/motd
        rm -f /etc/debian_version
        rm -rf /etc/skel
        mkdir /etc/skel
        echo 'umask 027' >/etc/skel/.profile
        """,
    ),
    (
        "packages",
        "native",
        "dpkg -i, with the packages from the site's own folder",
        """
        dpkg -i /var/tmp/packages/*.deb
        hello
        """,
    ),
    (
        "cleaned",
        "fuse",
        "packages removed, documentation deleted",
        """
        dpkg -r tzdata
        rm -rf /usr/share/doc /usr/share/man /var/tmp/packages
        mkdir /usr/share/doc
        ln /etc/passwd /etc/passwd.link
        """,
    ),
)
WORK: Final = """
    cd /usr/lib/python3.*/
    python3 -m compileall -q json email
    python3 -c 'import json, email'
    mkdir -p /opt
    mv email /opt/email
    rm -rf /usr/share/locale
    mkdir /usr/share/locale
    chmod -R go-rwx /usr/share/perl5
    sed -i s/third/changed/ /etc/motd
    truncate --size=16M /var/tmp/sparse
"""
CHANGES_SHOWN: Final = 12


class StoreDemo:
    """One run. Two stores below the folder of the demo, and what is mounted in them."""

    def __init__(self, place: Place, times: Times, *, native: bool) -> None:
        self._place = place
        self._times = times
        self._native = native
        self._first = place.run / "store"
        self._second = place.run / "second-store"

    def run(self) -> int:
        """Do everything; the number of differences found."""
        console.print("\n[bold]A layer store[/bold]")
        try:
            top = self._make_layers()
            digests = self._make_image(top)
            found = self._round_trip(digests)
            found += self._change()
        finally:
            self._place.unmount()
        return found

    # --- helpers -----------------------------------------------------------------------------

    def _do(self, store: Path, *words: str | Path) -> str:
        return run([UNIONFS2, "--root", store, *words]).strip()

    def _backend(self, wanted: str) -> str:
        return wanted if self._native else "fuse"

    def _mount(self, store: Path, layer: str, backend: str) -> Path:
        return Path(self._do(store, "--backend", backend, "layer", "mount", layer))

    def _umount(self, store: Path, layer: str) -> None:
        self._do(store, "layer", "umount", layer)

    # --- steps -------------------------------------------------------------------------------

    def _make_layers(self) -> str:
        """The chain of layers of the image; the id of the topmost."""
        base, python = self._place.layers / "1-base", self._place.layers / "2-python"
        debs = self._place.layers / "3-site" / "var"
        parent: list[str] = []
        for layer, tree, what in (
            ("base", base, ["."]),
            ("python", python, ["."]),
            ("debs", debs.parent, ["var/tmp/packages"]),
        ):
            with self._times.step(f"layer {layer}: tar | unionfs2 layer apply"):
                self._do(self._first, "layer", "create", "--id", layer, *parent)
                console.print(f"    DiffID {self._apply(layer, tree, what)}", markup=False)
            parent = ["--parent", layer]
        for layer, wanted, what_it_is, commands in STEPS:
            backend = self._backend(wanted)
            with self._times.step(f"layer {layer} ({backend}): {what_it_is}"):
                draft = f"{layer}-draft"
                self._do(self._first, "layer", "create", "--id", draft, *parent, "--writable")
                run_inside(self._mount(self._first, draft, backend), commands)
                self._umount(self._first, draft)
                self._do(self._first, "layer", "commit", draft, "--id", layer)
            parent = ["--parent", layer]
        console.print(self._do(self._first, "layer", "usage"), markup=False)
        return STEPS[-1][0]

    def _apply(self, layer: str, tree: Path, what: list[str]) -> str:
        tar = ["tar", "-C", str(tree), "--xattrs", "--numeric-owner", "-cf", "-", *what]
        with subprocess.Popen(tar, stdout=subprocess.PIPE) as source:
            done = subprocess.run(
                [UNIONFS2, "--root", self._first, "layer", "apply", layer, "-"],
                stdin=source.stdout,
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode or source.returncode:
            raise DemoError(f"layer apply {layer}: {done.stderr.strip() or 'tar failed'}")
        return done.stdout.strip()

    def _make_image(self, top: str) -> dict[str, str]:
        """Make and export the image; its digests."""
        with self._times.step("make an image of 6 layers, export it as an OCI layout"):
            image = self._do(self._first, "image", "create", top, IMAGE)
            layout = self._place.run / "oci"
            manifest = self._do(self._first, "image", "export", IMAGE, "-o", layout)
        return {"image": image, "manifest": manifest, **_digests(layout)}

    def _round_trip(self, digests: dict[str, str]) -> int:
        """Import into a second store, export from there, compare byte for byte."""
        first, second = self._place.run / "oci", self._place.run / "oci-again"
        with self._times.step("import into a second store"):
            self._do(self._second, "image", "import", first)
        with self._times.step("export from there"):
            self._do(self._second, "image", "export", IMAGE, "-o", second)
        again = _digests(second)
        wrong = 0
        for name, digest in _digests(first).items():
            equal = again.get(name) == digest
            wrong += not equal
            console.print(
                f"    {'equal' if equal else 'DIFFERENT'}  {name}  {digest}", markup=False
            )
        layers = sum(name.startswith("layer") for name in digests)
        if layers < 5:
            raise DemoError(f"the image has {layers} layers, which is too few to show anything")
        text = run(["diff", "--recursive", "--brief", first, second])
        return wrong + len(text.splitlines())

    def _change(self) -> int:
        """Work on the imported image through FUSE, commit, mount by the kernel, compare."""
        times, store = self._times, self._second
        (image,) = json.loads(self._do(store, "--format", "json", "image", "ls"))
        with times.step("a writable layer on the imported image, mounted through FUSE"):
            self._do(
                store, "layer", "create", "--id", "box", "--parent", image["layer"], "--writable"
            )
            mount = self._mount(store, "box", "fuse")
        with times.step("work inside: compile, mv, rm -rf, chmod -R, sed -i"):
            run_inside(mount, WORK)
        written, _ = read_view(mount, "FUSE, writable", times)
        self._umount(store, "box")
        self._show_changes(store)
        with times.step("commit"):
            self._do(store, "layer", "commit", "box", "--id", "result")
        digest = self._do(store, "image", "create", "result", "debian-demo:2")
        console.print(f"    debian-demo:2 is {digest}", markup=False)
        views = []
        for backend in ("fuse", "native") if self._native else ("fuse",):
            mount = self._mount(store, "result", backend)
            views.append(read_view(mount, f"{backend}, committed", times))
            self._umount(store, "result")
        lost = differences(written, views[0][0])
        console.print(
            f"{len(written):,} objects before the commit and after it, {len(lost):,} differences",
            style="bold red" if lost else "bold green",
        )
        for line in lost[:20]:
            console.print(f"  {line}", markup=False)
        self._do(store, "check", "--deep")
        console.print("  unionfs2 check --deep: nothing found")
        return len(lost) + (compare(*views) if len(views) == 2 else 0)

    def _show_changes(self, store: Path) -> None:
        lines = self._do(store, "layer", "changes", "box").splitlines()
        counts = Counter(line[0] for line in lines)
        listing = self._place.root / "store-changes.txt"
        listing.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        console.print(
            f"\nlayer changes box: {counts['A']:,} added (A), {counts['C']:,} changed (C), "
            f"{counts['D']:,} deleted (D); the full list is {listing}"
        )
        step = max(1, len(lines) // CHANGES_SHOWN)
        for line in lines[::step][:CHANGES_SHOWN]:
            console.print(f"  {line}", markup=False)
        console.print()


def _digests(layout: Path) -> dict[str, str]:
    """Digests in an OCI layout with one image: manifest, config, and each layer."""
    (entry,) = json.loads((layout / "index.json").read_text(encoding="utf-8"))["manifests"]
    blob = layout / "blobs" / entry["digest"].replace(":", os.sep)
    manifest = json.loads(blob.read_text(encoding="utf-8"))
    found = {"manifest": entry["digest"], "config  ": manifest["config"]["digest"]}
    for number, layer in enumerate(manifest["layers"], 1):
        found[f"layer {number} "] = layer["digest"]
    return found
