"""Files that are whole or as they were before: written under another name, then renamed; and a seal that says which."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# At the end of a sealed file, after the SHA-256 digest of all before it. torch.load and the dynamic loader do not mind.
MARK = b"emc2_kernels:seal"
SEAL_BYTES = hashlib.sha256().digest_size + len(MARK)
CHUNK = 1 << 20
DRAFT = r"\.[0-9a-f]{8}\.partial"  # what a draft's name has after that of the file


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write (and read) that takes ``path``'s place, whole and on the disk, when the block ends.

    At any moment, through killed processes and power cuts, ``path`` is the file from before or the new one. Where it is
    a symbolic link, the link stays and the file behind it is replaced. Permissions and, where this process may, the
    owner are those of the file from before; those of a first one follow the umask.

    Args:
        path: the file is written beside it as ``path`` + ".<8 hexadecimal digits>.partial". What a killed process
            leaves of these, the next one to write there removes.

    Raises:
        OSError: the disk is full, say, or ``path`` is no regular file. ``path`` is then as it was, as it is after any
            error in the block.
    """
    target = Path(os.path.realpath(path))
    try:
        before = os.stat(target)
    except FileNotFoundError:
        before = None
    if before is not None and not stat.S_ISREG(before.st_mode):  # renaming over /dev/null would take it away
        raise OSError(errno.EINVAL, "expected a regular file or none, found another kind", str(path))
    # Opened first: a directory that cannot be is an error before anything has changed.
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _draft(target, before) as (file, name):
            yield file
            file.flush()
            # The rename may reach the disk before the data does: after a power cut the name would hold an empty file.
            os.fsync(file.fileno())
            os.replace(name, target)
        # A rename is a change of the directory: until that is on the disk, a power cut can take it back.
        os.fsync(directory)
    finally:
        os.close(directory)


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a whole file, as ``replacing`` does; text as UTF-8. What is there and no regular file (a terminal, a pipe)
    is written to."""
    data = content.encode() if isinstance(content, str) else content
    try:
        special = not stat.S_ISREG(os.stat(path).st_mode)  # one look: between two of them another may make the file
    except FileNotFoundError:
        special = False
    if special:
        Path(path).write_bytes(data)
    else:
        with replacing(path) as file:
            file.write(data)


@contextmanager
def _draft(target: Path, before: os.stat_result | None) -> Iterator[tuple[BinaryIO, Path]]:
    _remove_leftovers(target)
    descriptor, name = _new_draft(target, 0o666 if before is None else 0o600)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            if before is not None:
                with suppress(PermissionError):
                    os.fchown(descriptor, before.st_uid, before.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(before.st_mode) & 0o777)
            yield file, name
    finally:
        name.unlink(missing_ok=True)


def _new_draft(target: Path, mode: int) -> tuple[int, Path]:
    """Locked for as long as it is open: that is how others know that it is not left over."""
    while True:
        name = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC  # never a file or link that is there
        descriptor = os.open(name, flags, mode)
        # Between its making and its lock it may be taken for a leftover; where there are no locks, nothing ever is.
        if _lock(descriptor) is not False and os.fstat(descriptor).st_nlink == 1:
            return descriptor, name
        os.close(descriptor)
        name.unlink(missing_ok=True)


def _remove_leftovers(target: Path) -> None:
    left = re.compile(re.escape(target.name) + DRAFT)
    with os.scandir(target.parent) as entries:
        names = [entry.path for entry in entries if left.fullmatch(entry.name)]
    for name in names:
        with suppress(OSError):  # another process's, or not ours to remove
            descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if _lock(descriptor):
                    os.unlink(name)
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether this process has it now; None on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def seal(sha256: hashlib._Hash) -> bytes:
    """What goes to the end of a file of which this is the digest."""
    return sha256.digest() + MARK


def why_not_whole(file: BinaryIO, kind: str) -> str | None:
    """What a file is that should be a sealed one of this kind; None where it is as it was written, and then at its
    beginning."""
    left = file.seek(0, os.SEEK_END) - SEAL_BYTES
    file.seek(max(left, 0))
    digest, mark = file.read(SEAL_BYTES - len(MARK)), file.read()
    if mark != MARK:
        return f"a file without a {kind}'s end: truncated, damaged or of another kind"
    sha256 = hashlib.sha256()
    file.seek(0)
    while left > 0:
        chunk = file.read(min(left, CHUNK))
        if not chunk:
            return "a file that became shorter as it was read"
        sha256.update(chunk)
        left -= len(chunk)
    file.seek(0)
    return None if sha256.digest() == digest else "a damaged one: its checksum is another"


def private_folder(path: Path) -> None:
    """Makes a folder, and those above it that are missing, for this user alone. What is there stays as it is."""
    if not path.is_dir():
        private_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
