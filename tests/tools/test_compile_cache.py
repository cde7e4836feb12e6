"""What a GPU check has compiled, on its way to another machine."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from bench.gpu import check, compile_cache
from bench.harness import CHECKOUT


def write_kernel(folder, name, size=1000):
    """As Triton's cache has it: all stages of the compiler's work, and a list of them by their whole paths."""
    folder.mkdir(parents=True)
    files = {
        f"{name}.{stage}": folder / f"{name}.{stage}" for stage in ("ttir", "ttgir", "llir", "ptx", "cubin", "json")
    }
    for path in files.values():
        path.write_bytes(os.urandom(size))
    group = {"child_paths": {each: str(path) for each, path in files.items()}}
    (folder / f"__grp__{name}.json").write_text(json.dumps(group))


def test_what_was_compiled_fits_into_a_small_file_and_is_found_again(tmp_path):
    here, there, archive = tmp_path / "here", tmp_path / "there", tmp_path / "cache.tar.gz"
    write_kernel(here / "triton" / "AB", "sweep_kernel")
    write_kernel(here / "triton" / "CD", "lse_kernel")
    (here / "extensions").mkdir()
    (here / "extensions" / "emc2_cuda.so").write_bytes(b"machine code")
    assert compile_cache.pack(here, archive) == 0
    assert compile_cache.unpack(archive, there) == 2
    assert (there / "extensions" / "emc2_cuda.so").read_bytes() == b"machine code"
    group = json.loads((there / "triton" / "AB" / "__grp__sweep_kernel.json").read_text())["child_paths"]
    assert group.keys() == {"sweep_kernel.cubin", "sweep_kernel.json"}  # Triton 3.9 wants all that are named
    assert all(Path(path).is_relative_to(there) for path in group.values())
    for name in group:
        assert Path(group[name]).read_bytes() == (here / "triton" / "AB" / name).read_bytes()


def test_what_does_not_fit_is_what_was_compiled_last(tmp_path):
    here, archive = tmp_path / "here", tmp_path / "cache.tar.gz"
    for number in range(6):
        write_kernel(here / "triton" / str(number), "kernel", 100_000)
        for file in (here / "triton" / str(number)).iterdir():
            os.utime(file, (number, number))
    assert compile_cache.pack(here, archive, limit=700_000) == 3 * 3
    assert archive.stat().st_size < 700_000
    assert compile_cache.unpack(archive, tmp_path / "there") == 3
    assert {folder.name for folder in (tmp_path / "there" / "triton").iterdir()} == {"0", "1", "2"}


def test_a_damaged_archive_is_refused_before_a_file_is_written(tmp_path):
    """Also where the damage is in a file's content, which the archive's own headers do not cover."""
    here, archive = tmp_path / "here", tmp_path / "cache.tar.gz"
    write_kernel(here / "triton" / "AB", "kernel", 20_000)
    compile_cache.pack(here, archive)
    whole = archive.read_bytes()
    for place in range(10, len(whole), len(whole) // 20):
        archive.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises((OSError, EOFError, zlib.error)):
            compile_cache.unpack(archive, tmp_path / "there")
        assert list((tmp_path / "there").iterdir()) == []


def test_what_is_unpacked_may_be_loaded_and_what_was_loaded_stays_whole(tmp_path):
    """Folders that others may write are refused, whatever the umask; a module that is overwritten where it lies would
    end the process that has it."""
    here, there, archive = tmp_path / "here", tmp_path / "there", tmp_path / "cache.tar.gz"
    module = Path("extensions", "emc2_kernels", "key", "emc2_cuda.so")
    (here / module).parent.mkdir(parents=True)
    (here / module).write_bytes(b"machine code")
    compile_cache.pack(here, archive)
    before = os.umask(0)
    try:
        compile_cache.unpack(archive, there)
    finally:
        os.umask(before)
    for folder in list((there / module).parents)[:4]:
        assert folder.stat().st_mode & 0o777 == 0o700
    assert (there / module).stat().st_mode & 0o022 == 0
    with (there / module).open("r+b") as loaded:
        loaded.write(b"MACHINE CODE")
        loaded.flush()
        compile_cache.unpack(archive, there)
        loaded.seek(0)
        assert loaded.read() == b"MACHINE CODE" and (there / module).read_bytes() == b"machine code"
    assert [path.name for path in there.iterdir()] == ["extensions"]


COMPILE = """
from bench.gpu import compiled
launched = next(each for each in compiled.launches(compiled.CASES["loss d=128"], 90))
print(len(compiled.compile_launch(launched, 90).asm["cubin"]))
"""


def test_triton_takes_what_was_unpacked(tmp_path):
    """Nothing is compiled again: no file is added."""
    pytest.importorskip("triton")
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    sizes = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        before = {file for file in folder.rglob("*") if file.is_file()}
        command = [sys.executable, "-c", COMPILE]
        done = subprocess.run(
            command,
            cwd=CHECKOUT,
            env=clean | compile_cache.environment(folder),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        sizes.append(int(done.stdout))
        added = {file for file in folder.rglob("*") if file.is_file()} - before
        assert bool(added) == (folder.name == "here")
        if added:
            compile_cache.pack(folder, tmp_path / "cache.tar.gz")
            assert compile_cache.unpack(tmp_path / "cache.tar.gz", tmp_path / "there") == 1
    assert sizes[0] == sizes[1]


def test_a_damaged_cache_is_done_without(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check, "CACHE", tmp_path / "cache")
    whole = tmp_path / "cache.tar.gz"
    write_kernel(tmp_path / "here" / "triton" / "AB", "kernel", 20_000)
    compile_cache.pack(tmp_path / "here", whole)
    for content in (b"junk", whole.read_bytes()[:9000], b""):
        (tmp_path / "damaged.tar.gz").write_bytes(content)
        check.load_cache(tmp_path / "damaged.tar.gz")
        assert "was not taken in" in capsys.readouterr().out
    check.load_cache(whole)
    assert "kernels from cache.tar.gz: 1" in capsys.readouterr().out
