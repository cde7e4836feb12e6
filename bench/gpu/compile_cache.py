"""What a run compiled, as one small file that a later run on another machine of the kind takes in.

Triton's cache and the folder of our own extensions, under one folder. Of a kernel Triton's cache has six stages of the
compiler's work; the machine code and its description are enough to launch it. Triton keeps a list of them by their
whole paths, and Triton 3.9 takes none where one is missing: so the list is written anew where the cache is unpacked.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import tempfile
from pathlib import Path

from emc2_kernels.files import private_folder, replacing

LIMIT = 15_000_000  # bytes; what is compiled last is left out
TRITON, EXTENSIONS = "triton", "extensions"
NEEDED = (".cubin", ".json", ".so")


def environment(folder: Path) -> dict[str, str]:
    """Of processes that are to compile into the folder."""
    return {"TRITON_CACHE_DIR": str(folder / TRITON), "TORCH_EXTENSIONS_DIR": str(folder / EXTENSIONS)}


def pack(folder: Path, target: Path, limit: int = LIMIT) -> int:
    """Writes what launches need into one .tar.gz of at most about ``limit`` bytes; how many files were left out."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name.endswith(NEEDED)]
    groups: dict[Path, list[Path]] = {}  # a kernel's files are of no use without each other
    for file in files:
        groups.setdefault(file.parent, []).append(file)
    left_out = 0
    with (
        replacing(target) as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=6, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for group in sorted(groups.values(), key=lambda group: min(file.stat().st_mtime for file in group)):
            stream.flush()  # or what is still inside would not be counted
            if raw.tell() + sum(file.stat().st_size for file in group) // 2 > limit:
                left_out += len(group)
                continue
            for file in sorted(group):
                archive.add(file, file.relative_to(folder))
    return left_out


def unpack(archive: Path, folder: Path) -> int:
    """Into the folder, beside what is there; how many kernels there were in the archive.

    All of it is read first, for its checksum stands at its end: of a damaged archive nothing is taken. Files are
    renamed into place, so that a process which has loaded one keeps it whole. Folders are made for this user alone, or
    what lies in them would not be loaded.
    """
    private_folder(folder)
    content = io.BytesIO(gzip.decompress(archive.read_bytes()))
    with tempfile.TemporaryDirectory(dir=folder) as beside, tarfile.open(fileobj=content, mode="r:") as packed:
        names = [Path(member.name) for member in packed if member.isfile()]
        packed.extractall(beside, filter="data")
        for name in names:
            private_folder((folder / name).parent)
            os.replace(Path(beside, name), folder / name)
    groups = [folder / name for name in names if name.name.startswith("__grp__")]
    for group in groups:
        paths = [group.parent / name for name in json.loads(group.read_text())["child_paths"]]
        group.write_text(json.dumps({"child_paths": {path.name: str(path) for path in paths if path.exists()}}))
    return len(groups)
