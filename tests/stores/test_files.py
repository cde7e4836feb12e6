"""Files that are replaced whole: in which order, through links, with which permissions, and beside whom."""

import errno
import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from emc2_kernels import checkpoint, files


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def umask():
    """Sets the process's umask, as os.umask does."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_what_is_written_takes_the_place_of_what_was_there(tmp_path):
    path = tmp_path / "file"
    for content in (b"first", "second, in UTF-8: \N{GREEK SMALL LETTER PHI}", b""):
        files.write(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("save", [lambda path: files.write(path, b"new"), lambda path: checkpoint.save(path, [1])])
def test_data_reach_the_disk_before_the_name_and_then_the_name_does(save, tmp_path, monkeypatch):
    """Else a power cut could leave an empty file under the name, or take the rename back."""
    path, seen = tmp_path / "file", []
    path.write_bytes(b"old")
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor):
        found = os.fstat(descriptor)
        what = "directory" if stat.S_ISDIR(found.st_mode) else found.st_size
        assert what != "directory" or found.st_ino == tmp_path.stat().st_ino
        seen.append((what, path.read_bytes() == b"old"))
        fsync(descriptor)

    def seen_replace(source, target):
        seen.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    save(path)
    assert seen == [(path.stat().st_size, True), "rename", ("directory", False)]


def test_an_error_leaves_the_file_before_and_nothing_else(tmp_path):
    files.write(tmp_path / "file", "before")
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "file") as file:
        file.write(b"after")
        1 / 0  # noqa: B018
    assert (tmp_path / "file").read_text() == "before" and names(tmp_path) == ["file"]


def test_a_link_stays_and_the_file_behind_it_is_replaced(tmp_path):
    (tmp_path / "behind").mkdir()
    target, link, dangling = tmp_path / "behind" / "target", tmp_path / "link", tmp_path / "dangling"
    target.write_text("before")
    link.symlink_to(Path("behind") / "target")
    dangling.symlink_to(tmp_path / "behind" / "first")
    files.write(link, "after")
    files.write(dangling, "new")
    assert link.is_symlink() and dangling.is_symlink() and not target.is_symlink()
    assert target.read_text() == "after" and (tmp_path / "behind" / "first").read_text() == "new"
    assert names(tmp_path / "behind") == ["first", "target"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError) as raised:
        files.write(tmp_path / "loop", "")
    assert raised.value.errno == errno.ELOOP and (tmp_path / "loop").is_symlink()


def test_permissions_are_kept_and_a_new_file_follows_the_umask(tmp_path, umask):
    path = tmp_path / "file"
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        umask(mask)
        files.write(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == mode
        path.unlink()
    umask(0o022)
    for mode in (0o600, 0o640, 0o664, 0o400):
        files.write(path, "old")
        path.chmod(mode)
        with files.replacing(path) as file:
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == mode, "others could read what is being written"
            file.write(b"new")
        assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_text() == "new"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_the_owner_is_kept(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    os.chown(path, 12345, 23456)
    files.write(path, "after")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(OSError, match="expected a regular file or none"), files.replacing(tmp_path / name):
            pass
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    files.write(tmp_path / "pipe", "through")
    reader.join()
    assert read == ["through"]
    with pytest.raises(IsADirectoryError):
        files.write(tmp_path / "folder", "")
    with pytest.raises(FileNotFoundError):
        files.write(tmp_path / "nowhere" / "file", "")
    assert names(tmp_path) == ["folder", "pipe"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and names(tmp_path / "folder") == []


def test_planted_links_are_not_followed(tmp_path, monkeypatch):
    """Neither at the name that anybody could foresee, nor at the very name that is drawn."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    drawn = iter(["00000000", "00000001"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: next(drawn))
    for name in ("file.partial", "file.00000000.partial"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(FileExistsError):
        files.write(tmp_path / "file", "rubbish")
    files.write(tmp_path / "file", "new")
    assert victim.read_text() == "precious" and (tmp_path / "file").read_text() == "new"
    assert names(tmp_path) == ["file", "file.00000000.partial", "file.partial", "victim"]


def test_drafts_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path):
    others = ("other.01234567.partial", "file.0123456.partial", "file.01234567.partial.txt", "file.partial")
    for name in ("file.01234567.partial", "file.89abcdef.partial", *others):
        (tmp_path / name).write_text("left")
    with open(tmp_path / "file.89abcdef.partial", "rb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        files.write(tmp_path / "file", "new")
    assert names(tmp_path) == sorted(["file", "file.89abcdef.partial", *others])
    files.write(tmp_path / "file", "newer")
    assert names(tmp_path) == sorted(["file", *others])


def test_a_draft_that_is_taken_for_a_leftover_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, raced = files._lock, []

    def swept_up(descriptor):  # another process sweeps between the making of the first draft and its lock
        if not raced:
            raced.append(True)
            files._remove_leftovers(tmp_path / "file")
        return lock(descriptor)

    monkeypatch.setattr(files, "_lock", swept_up)
    files.write(tmp_path / "file", "new")
    assert raced and (tmp_path / "file").read_text() == "new" and names(tmp_path) == ["file"]


def test_without_locks_files_are_written_and_leftovers_stay(tmp_path, monkeypatch):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / "file.01234567.partial").write_text("left")
    files.write(tmp_path / "file", "new")
    assert names(tmp_path) == ["file", "file.01234567.partial"]


def test_of_many_that_write_at_once_one_has_the_name(tmp_path):
    contents, errors = {f"{number} " * 50_000 for number in range(8)}, []
    together = threading.Barrier(8)

    def write_often(content):
        try:
            for number in range(20):
                if number % 2 == 0 and together.wait() == 0:  # from a name that nobody has, too
                    (tmp_path / "file").unlink(missing_ok=True)
                together.wait()
                files.write(tmp_path / "file", content)
                assert (tmp_path / "file").read_text() in contents
        except BaseException as error:
            errors.append(error)
            together.abort()

    threads = [threading.Thread(target=write_often, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and names(tmp_path) == ["file"]
