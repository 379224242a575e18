"""Writes a tar file of a system that brings what NVIDIA's PyTorch image brings, without GPUs.

    python stand_in_base.py DEBIAN.tar | docker import - NAME:TAG

DEBIAN.tar comes from mmdebstrap. Put into it: the Python that runs this, and the packages of its
environment (torch, pytest, ...) but this one. The result goes to standard output.
"""

import sys
import sysconfig
import tarfile
from pathlib import Path

VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
LIBRARY = f"usr/local/lib/{VERSION}"
FOR_THE_BUILD = ("xxhash", "xxhash-")
"""A package and the beginning of its metadata's name: left out, so that the build fetches it."""
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
"""This machine's, which may know a proxy's."""
LEFT_OUT = ("test", "tests", "idlelib", "tkinter", "lib2to3")
"""Of the standard library, by name of the directory."""


def main() -> None:
    """Copies the one and adds the other."""
    base = Path(sys.base_prefix)
    with (
        tarfile.open(sys.argv[1]) as debian,
        tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as out,
    ):
        for member in debian:
            # Docker brings its own devices, and takes no path twice.
            if member.name.startswith("./dev/") or member.name == f".{CERTIFICATES}":
                continue
            out.addfile(member, debian.extractfile(member) if member.isreg() else None)
        out.add(base / "bin" / VERSION, f"usr/local/bin/{VERSION}", filter=_of_root)
        for library in sorted((base / "lib").glob("libpython3*.so*")):
            out.add(library, f"usr/local/lib/{library.name}", filter=_of_root)
        for entry in sorted((base / "lib" / VERSION).iterdir()):
            if entry.name != "site-packages" and entry.name not in LEFT_OUT:
                out.add(entry, f"{LIBRARY}/{entry.name}", filter=_of_root)
        for entry in sorted(Path(sysconfig.get_path("purelib")).iterdir()):
            # Editable installations point to places that are not in there.
            name = entry.name
            lacking = name in FOR_THE_BUILD or name.startswith(FOR_THE_BUILD[1])
            if not lacking and "megatron_dsv3" not in name and not name.endswith(".pth"):
                out.add(entry, f"{LIBRARY}/site-packages/{name}", filter=_of_root)
        out.add(CERTIFICATES, str(CERTIFICATES).lstrip("/"), filter=_of_root)
        for name in ("python3", "python"):
            link = tarfile.TarInfo(f"usr/local/bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, VERSION
            out.addfile(link)


def _of_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


if __name__ == "__main__":
    main()
