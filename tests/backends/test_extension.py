"""Compiled modules in their cache: whole, trusted, built once by whoever comes first, and told of where they are not.

With a module of a few lines; test_cpu_first_use.py has the compiled core.
"""

from __future__ import annotations

import fcntl
import grp
import hashlib
import os
import pwd
import shutil
import signal
import subprocess
import sysconfig
import threading
import time
from pathlib import Path

import pytest

from emc2_kernels import files
from emc2_kernels.backends import extension as extensions

SOURCE = """
#include <Python.h>
static PyObject* answer(PyObject* self, PyObject* none) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {0}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tiny", "", -1, methods};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit_tiny() { return PyModule_Create(&definition); }
"""


@pytest.fixture(scope="session")
def module_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler to build with")
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.cpp").write_text(SOURCE)
    flags = ["-shared", "-fPIC", "-I", sysconfig.get_paths()["include"]]
    subprocess.run([compiler, *flags, folder / "tiny.cpp", "-o", folder / "tiny.so"], check=True)
    return (folder / "tiny.so").read_bytes()


class Tiny:
    """An extension in a cache of its own, which counts how often it is compiled."""

    def __init__(self, cache: Path, content: bytes) -> None:
        self.path, self.content, self.compiled = cache / "emc2_kernels" / "key" / "tiny.so", content, 0
        self.compilers = ["c++"]

    def extension(self) -> extensions.Extension:
        """As a process of its own has it."""
        return extensions.Extension("tiny", "tiny kernels", "CXX", lambda: self.path, self.compiler, self.compile)

    def compiler(self) -> list[str]:
        if not self.compilers:
            raise extensions.Unavailable("no compiler")
        return self.compilers

    def compile(self, compiler: list[str], target: Path) -> None:
        self.compiled += 1
        target.write_bytes(self.content)


@pytest.fixture
def tiny(tmp_path: Path, module_bytes: bytes) -> Tiny:
    return Tiny(tmp_path / "a {cache}", module_bytes)


def sealed(content: bytes) -> bytes:
    return content + files.seal(hashlib.sha256(content))


def fails(extension: extensions.Extension) -> str:
    """The reason, which is that of each try, and of the table."""
    with pytest.raises(extensions.Unavailable) as raised:
        extension.library()
    with pytest.raises(extensions.Unavailable) as again:
        extension.library()
    assert str(again.value) == str(raised.value) == extension.why_unavailable()
    return str(raised.value)


def test_what_was_built_is_found_by_the_next(tiny: Tiny) -> None:
    assert tiny.extension().library().answer() == 42
    tiny.compilers = []
    later = tiny.extension()
    assert later.why_unavailable() is None and later.library().answer() == 42 and tiny.compiled == 1
    assert tiny.path.read_bytes() == sealed(tiny.content)
    assert sorted(path.name for path in tiny.path.parent.iterdir()) == ["lock", "tiny.so"]


def damages(whole: bytes) -> dict[str, bytes]:
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    return {
        "half of it": whole[: len(whole) // 2],
        "but its last byte": whole[:-1],
        "nothing": b"",
        "a flipped bit": bytes(flipped),
        "no seal": whole[: -files.SEAL_BYTES],
    }


def test_a_damaged_module_is_built_again_and_never_loaded(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a module is mapped without an error, and ends the process where its missing half is touched."""
    tiny.extension().library()
    whole, load = tiny.path.read_bytes(), extensions.load
    monkeypatch.setattr(extensions, "load", lambda module, path: path.read_bytes() == whole and load(module, path))
    for number, (name, damaged) in enumerate(damages(whole).items()):
        tiny.path.unlink()  # what this process has loaded stays whole
        tiny.path.write_bytes(damaged)
        tiny.compilers = []
        assert tiny.extension().why_unavailable() == "no compiler", name
        with pytest.raises(extensions.Unavailable, match="no compiler"):
            tiny.extension().library()
        tiny.compilers = ["c++"]
        assert tiny.extension().library().answer() == 42, name
        assert tiny.compiled == 2 + number and tiny.path.read_bytes() == whole


def test_what_others_may_write_is_refused_by_name(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.extension().library()
    monkeypatch.setattr(extensions, "load", lambda module, path: pytest.fail("it was loaded"))
    monkeypatch.setattr(extensions.grp, "getgrgid", lambda number: group("staff"))
    folder = tiny.path.parent
    for place in (folder.parent.parent, folder.parent, folder, tiny.path):
        before = place.stat().st_mode & 0o7777
        for more in (0o020, 0o002):
            place.chmod(before | more)
            remedy = f"{place} may be written by others (mode {before | more:o}): what lies there would run as you"
            told = fails(tiny.extension())
            assert told.startswith(remedy) and f"chmod go-w '{place}'" in told and "TORCH_EXTENSIONS_DIR" in told
        place.chmod(before)
    monkeypatch.undo()
    assert tiny.extension().library().answer() == 42 and tiny.compiled == 1
    folder.parent.parent.chmod(0o1777)  # as /tmp: in it, others may write no file that is not theirs
    assert tiny.extension().library().answer() == 42


def group(name: str, *members: str) -> grp.struct_group:
    return grp.struct_group((name, "x", 12, list(members)))


def test_a_group_of_nobody_else_may_write(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where each user has a group of the same name, and files are made writable by it."""
    me = pwd.getpwuid(os.geteuid()).pw_name
    tiny.extension().library()
    tiny.path.parent.parent.chmod(0o775)
    refused = [group("staff"), group("staff", me), group(me, "bob"), group(me, me, "bob")]
    for found in refused:
        monkeypatch.setattr(extensions.grp, "getgrgid", lambda number, found=found: found)
        assert "may be written by others (mode 775)" in fails(tiny.extension())
    for found in (group(me), group(me, me)):
        monkeypatch.setattr(extensions.grp, "getgrgid", lambda number, found=found: found)
        assert tiny.extension().library().answer() == 42
        tiny.path.parent.parent.chmod(0o777)
        assert "may be written by others (mode 777)" in fails(tiny.extension())
        tiny.path.parent.parent.chmod(0o775)
    monkeypatch.setattr(
        extensions.pwd, "getpwuid", lambda number: {}[number]
    )  # a user without an entry has no such group
    assert "may be written by others" in fails(tiny.extension())


def test_nothing_is_built_where_others_may_write(tiny: Tiny) -> None:
    tiny.path.parent.parent.mkdir(parents=True)
    tiny.path.parent.parent.chmod(0o777)
    with pytest.raises(extensions.Unavailable, match="emc2_kernels may be written by others"):
        tiny.extension().library()
    assert tiny.compiled == 0 and not tiny.path.parent.exists()


def test_another_owners_module_is_refused_and_roots_is_not(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.extension().library()
    folder, stat, me = tiny.path.parent, os.stat, 12345
    owners: dict[Path, int] = {}

    def owned(path: str | Path, **options: object) -> os.stat_result:
        found = stat(path, **options)
        return os.stat_result([*found[:4], owners.get(Path(path), me), *found[5:]])

    monkeypatch.setattr(extensions.os, "stat", owned)
    monkeypatch.setattr(extensions.os, "geteuid", lambda: me)
    for place in (folder.parent.parent, folder.parent, folder, tiny.path):
        owners[place] = 54321
        reason = f"{place} belongs to user 54321, neither root nor the user of this process ({me}): what lies there"
        assert tiny.extension().why_unavailable().startswith(reason)
        owners[place] = 0
        assert tiny.extension().why_unavailable() is None


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_what_is_built_is_private_whatever_the_umask(tiny: Tiny, mask: int) -> None:
    before = os.umask(mask)
    try:
        assert tiny.extension().library().answer() == 42
    finally:
        os.umask(before)
    folder = tiny.path.parent
    assert [place.stat().st_mode & 0o777 for place in (folder.parent.parent, folder.parent, folder)] == [0o700] * 3
    assert tiny.path.stat().st_mode & 0o777 == 0o644
    assert tiny.extension().why_unavailable() is None


def test_threads_that_come_at_once_build_once_and_load_once(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    compile_it, found, errors, loads, load = tiny.compile, [], [], [], extensions.load
    monkeypatch.setattr(extensions, "load", lambda module, path: loads.append(path) or load(module, path))

    def slow(compiler: list[str], target: Path) -> None:
        time.sleep(0.05)
        compile_it(compiler, target)

    tiny.compile = slow
    extension, barrier = tiny.extension(), threading.Barrier(16)

    def first_use() -> None:
        barrier.wait()
        try:
            found.append(extension.library())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=first_use) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and tiny.compiled == 1 and loads == [tiny.path]
    assert "another process" not in capsys.readouterr().err
    assert len(found) == 16 and len(set(map(id, found))) == 1 and found[0].answer() == 42


def test_a_child_that_was_forked_amid_a_build_neither_waits_nor_makes_others_wait(tiny: Tiny, tmp_path: Path) -> None:
    other = Tiny(tmp_path / "other", tiny.content)
    other.extension().library()
    compile_it, children = tiny.compile, []
    reads, writes = os.pipe()

    def forking(compiler: list[str], target: Path) -> None:
        children.append(os.fork())
        if children[0] == 0:
            signal.alarm(20)
            answer = other.extension().library().answer()
            os.read(reads, 1)  # outlives the build, with its lock file open
            os._exit(answer)
        compile_it(compiler, target)

    tiny.compile = forking
    assert tiny.extension().library().answer() == 42
    with open(tiny.path.parent / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(writes, b".")
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 42
    os.close(reads)
    os.close(writes)


def test_another_process_that_builds_is_waited_for_and_said_so(tiny: Tiny, capsys: pytest.CaptureFixture) -> None:
    tiny.path.parent.mkdir(parents=True)
    with open(tiny.path.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = []
        thread = threading.Thread(target=lambda: found.append(tiny.extension().library()))
        thread.start()
        said = ""
        while "waiting for another process, which builds the tiny kernels" not in said:
            time.sleep(0.01)
            said += capsys.readouterr().err
        tiny.path.write_bytes(sealed(tiny.content))
    thread.join()
    assert found[0].answer() == 42 and tiny.compiled == 0


def test_what_a_killed_build_left_is_removed(tiny: Tiny) -> None:
    left = tiny.path.parent / "build"
    left.mkdir(parents=True)
    (left / "tiny.so").write_bytes(b"half")
    (left / "other.o").touch()
    tiny.compile = lambda compiler, target: target.write_bytes(tiny.content + bytes(len(os.listdir(target.parent))))
    assert tiny.extension().library().answer() == 42 and not left.exists()
    assert tiny.path.read_bytes() == sealed(tiny.content)


def test_a_compiler_without_a_result_and_one_with_a_useless_result(tiny: Tiny) -> None:
    """Neither leaves what a later process, with a better compiler, would trip over."""
    good, useless = tiny.compile, lambda compiler, target: target.write_bytes(b"rubbish")
    remedy = "set CXX to another compiler"
    for bad, reason in ((lambda compiler, target: None, "has written no module"), (useless, "do not load")):
        tiny.compile = bad
        told = fails(tiny.extension())
        assert reason in told and remedy in told and "TORCH_EXTENSIONS_DIR" in told
        assert [path.name for path in tiny.path.parent.iterdir()] == ["lock"]
    tiny.compile = good
    assert tiny.extension().library().answer() == 42


def test_a_whole_module_that_does_not_load_stays(tiny: Tiny) -> None:
    """Built with a newer C++ library, say, in a home directory that machines share: others load it."""
    tiny.path.parent.mkdir(parents=True)
    tiny.path.write_bytes(sealed(b"no shared object"))
    assert f"do not load ({tiny.path}" in (told := fails(tiny.extension())) and f"delete {tiny.path}" in told
    assert tiny.path.exists() and tiny.compiled == 0


def test_a_cache_that_cannot_be_written(tiny: Tiny, tmp_path: Path) -> None:
    """What can be seen before is seen before: by why_unavailable. Permissions would not stop root."""
    tiny.path.parent.mkdir(parents=True)
    (tiny.path.parent / "lock").mkdir()
    told = fails(tiny.extension())
    assert "key cannot be written" in told and "TORCH_EXTENSIONS_DIR" in told and tiny.compiled == 0
    (tmp_path / "file").touch()
    tiny.path = tmp_path / "file" / "emc2_kernels" / "key" / "tiny.so"
    reason = f"the build cache {tiny.path.parent} cannot be written (because of {tmp_path / 'file'}): set TORCH_EXT"
    assert tiny.extension().why_unavailable().startswith(reason)
    tiny.path = tmp_path / ("n" * 300) / "key" / "tiny.so"
    assert "File name too long" in tiny.extension().why_unavailable()


@pytest.mark.parametrize("stream", [None, "closed", "/dev/full"])
def test_a_standard_error_that_takes_nothing_stops_nothing(tiny, stream, tmp_path, monkeypatch) -> None:
    if stream == "/dev/full" and not os.path.exists(stream):
        pytest.skip("there is no full device")
    broken = None if stream is None else open(tmp_path / "err" if stream == "closed" else stream, "w")  # noqa: SIM115
    if stream == "closed":
        broken.close()
    monkeypatch.setattr("sys.stderr", broken)
    assert tiny.extension().library().answer() == 42
    if stream == "/dev/full":
        with pytest.raises(OSError):
            broken.close()


def script(path: Path, text: str | bytes) -> str:
    path.write_bytes(b"#!/bin/sh\n" + (text.encode() if isinstance(text, str) else text))
    path.chmod(0o755)
    return str(path)


def test_how_a_compiler_fails_is_told(tmp_path: Path) -> None:
    def told(text: str | bytes) -> str:
        with pytest.raises(extensions.Unavailable) as raised:
            extensions.run([script(tmp_path / "c++", text), "-c"], tmp_path)
        return str(raised.value).replace(str(tmp_path), "")

    assert told("echo out; echo boom >&2; exit 3") == "/c++ ended with 3:\nout\nboom"
    assert told("kill -SEGV $$") == "/c++ was ended by signal 11 (Segmentation fault):\n"
    assert (
        told(b"printf '\\377\\376 no UTF-8' >&2; exit 1")
        == "/c++ ended with 1:\n\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} no UTF-8"
    )
    assert len(told("head -c 1000000 /dev/zero | tr '\\0' x; exit 1")) < 5000
    (tmp_path / "c++").write_bytes(b"\x7fELF, or not")
    with pytest.raises(extensions.Unavailable, match=r"c\+\+ cannot be run: Exec format error"):
        extensions.run([str(tmp_path / "c++")], tmp_path)
    with pytest.raises(extensions.Unavailable, match="nowhere cannot be run: No such file"):
        extensions.run([str(tmp_path / "nowhere")], tmp_path)
    extensions.run([script(tmp_path / "c++", 'echo warning >&2; test "$TMPDIR" = "$1"'), str(tmp_path)], tmp_path)


@pytest.fixture
def fake_compiler(tmp_path: Path) -> str:
    """Waits for a file go.<source> beside the source, or fails where that says so; writes what it is to write."""
    return script(
        tmp_path / "fake c++",
        """while test "$1" != -c && test "$1" != -o; do shift; done
        if test "$1" = -c; then
          echo "$2" >> "$0.log"
          while ! test -e "$2.go"; do sleep 0.01; done
          grep -q fail "$2.go" && exit 1
          shift 2
        fi
        echo made > "$2"
        """,
    )


def compile_fake(compiler: str, folder: Path, names: list[str], **said: str) -> Path:
    sources = [folder / name for name in names]
    for source in sources:
        if source.name in said:
            Path(f"{source}.go").write_text(said[source.name])
    target = folder / "made.so"
    extensions.compile_and_link([compiler], [], sources[:-1], sources[-1], target)
    return target


def test_a_long_build_tells_how_far_it_is_and_a_short_one_does_not(
    tmp_path: Path, fake_compiler: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(extensions, "usable_cores", lambda: 2)
    names = ["a", "b", "c"]
    assert compile_fake(fake_compiler, tmp_path, names, a="", b="", c="").read_text() == "made\n"
    assert capsys.readouterr().err == ""

    (tmp_path / "c.go").unlink()  # the binding, which is begun first: others go on beside it
    monkeypatch.setattr(extensions, "_PROGRESS_SECONDS", 0.05)
    thread = threading.Thread(target=compile_fake, args=(fake_compiler, tmp_path, names))
    thread.start()
    said, end = "", time.monotonic() + 10
    while said.count("2 of 3 files compiled after ") < 2 and time.monotonic() < end:  # again, as it goes on
        time.sleep(0.01)
        said += capsys.readouterr().err
    (tmp_path / "c.go").touch()
    thread.join()
    assert said.count("2 of 3 files compiled after ") >= 2
    assert "3 of 3" not in said + capsys.readouterr().err


def test_when_a_file_does_not_compile_no_further_one_is_begun(
    tmp_path: Path, fake_compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extensions, "usable_cores", lambda: 1)
    with pytest.raises(extensions.Unavailable, match="ended with 1"):
        compile_fake(fake_compiler, tmp_path, ["a", "b", "c", "binding"], binding="fail", a="", b="", c="")
    begun = Path(f"{fake_compiler}.log").read_text().split()
    assert Path(begun[0]).name == "binding" and len(begun) < 4


def test_a_compiler_is_a_path_or_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaced = tmp_path / "with spaces"
    spaced.mkdir()
    path = script(spaced / "g++", "")
    monkeypatch.setenv("PATH", str(spaced))

    def found(chosen: str | None) -> list[str] | str:
        monkeypatch.delenv("CXX", raising=False)
        if chosen is not None:
            monkeypatch.setenv("CXX", chosen)
        try:
            return extensions.find_compiler("C++ compiler", "CXX", ("c++", "g++"), "g++")
        except extensions.Unavailable as error:
            return str(error)

    for chosen in (None, "", "g++", path, f"'{path}'", f'"{path}"'):
        assert found(chosen) == [path], chosen
    assert found("g++ -m64 '-DX=a b'") == [path, "-m64", "-DX=a b"]
    assert found(f"{tmp_path}/with\\ spaces/g++ -m64") == [path, "-m64"]
    remedy = "install g++, or set CXX to one"
    assert found(" ") == f"no C++ compiler (CXX=' ') found: {remedy}"
    assert found("nowhere -m64") == f"no C++ compiler (nowhere -m64) found: {remedy}"
    assert found("g++ '") == """CXX must be words as for a shell, got "g++ '" (No closing quotation)"""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(None) == f"no C++ compiler (c++, g++) found: {remedy}"


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variables, expected in (
        ({"TORCH_EXTENSIONS_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a/emc2_kernels"),
        ({"TORCH_EXTENSIONS_DIR": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/emc2_kernels"),
        ({"HOME": "/c"}, "/c/.cache/emc2_kernels"),
        ({"TORCH_EXTENSIONS_DIR": "here"}, f"{tmp_path}/here/emc2_kernels"),  # whatever the working directory is later
    ):
        for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert str(extensions.cache_root()) == expected
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(
        extensions.Unavailable, match="no folder to build kernels in .*: set TORCH_EXTENSIONS_DIR to one"
    ):
        extensions.cache_root()


def test_missing_sources_are_no_fault_of_the_cache(tmp_path: Path) -> None:
    with pytest.raises(extensions.Unavailable, match=r"sources cannot be read .*x\.cpp.*: install emc2_kernels again"):
        extensions.source_digest([tmp_path / "x.cpp"], [])
