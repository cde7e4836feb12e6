"""`python -m emc2_kernels`, for bug reports: whole on any machine, whatever is missing or broken there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from first_use import finish, start_python

import emc2_kernels
from emc2_kernels import machine

RUN = """
import json, runpy, sys
ran = []
sys.addaudithook(lambda event, arguments: ran.append(arguments[1]) if event == "subprocess.Popen" else None)
runpy.run_module("emc2_kernels", run_name="__main__")
assert "triton" not in sys.modules and "emc2_cpu" not in sys.modules
print(json.dumps(ran), file=sys.stderr)
"""


def parsed(text: str) -> dict[str, str]:
    return {line[:18].strip(): line[18:].strip() for line in text.splitlines()}


def test_it_says_what_is_here_and_compiles_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    out, ran = finish(start_python(RUN, TORCH_EXTENSIONS_DIR=cache, TRITON_INTERPRET=None, CUDACXX="/none/nvcc"))
    said = parsed(out)
    assert list(said) == [*machine.LINES, *(f"backend {name}" for name in emc2_kernels.backends())]
    assert said["emc2_kernels"].startswith(emc2_kernels.__version__) and torch.__version__ in said["torch"]
    assert said["CPU"].startswith(machine.cpu_name()) and torch.backends.cpu.get_cpu_capability() in said["CPU"]
    assert said["cache"] == f"{cache}/emc2_kernels, 0 modules" and not cache.exists()
    assert "no CUDA compiler (/none/nvcc) found" in said["CUDA compiler"]
    assert "CUDACXX='/none/nvcc'" in said["variables"] and "TRITON_INTERPRET" not in said["variables"]
    assert said["backend reference"] == "available"
    asked = [command for command in json.loads(ran) if command[-1] != "--version"]
    assert asked in ([], [["uname", "-p"]])  # nothing else is run


def test_what_is_broken_is_told_and_ends_no_other_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("planted")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(Path, "read_text", broken)  # no /proc
    monkeypatch.setattr(subprocess, "run", broken)
    monkeypatch.setitem(machine.LINES, "system", broken)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("nowhere")))
    said = parsed(machine.description())
    assert list(said) == [*machine.LINES, *(f"backend {name}" for name in emc2_kernels.backends())]
    assert said["system"] == said["GPU"] == "unknown (OSError: planted)"
    assert "; unknown; torch runs" in said["CPU"] and machine.cpu_name() and machine.instruction_sets() == []
    assert said["C++ compiler"].endswith(": unknown") or "no C++ compiler" in said["C++ compiler"]
    assert said["cache"] == "no folder to build kernels in (nowhere): set TORCH_EXTENSIONS_DIR to one"
    assert said["Python"] and said["backend reference"] == "available"


def test_a_gpu_is_told_with_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        name, major, minor, total_memory = "A Card", 9, 0, 80e9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Card)
    assert machine.LINES["GPU"]() == "; ".join(["A Card, compute capability 9.0, 80 GB"] * 2)


@pytest.mark.parametrize(
    ("listing", "name", "sets"),
    [
        ("model name\t: A CPU @ 2 GHz\nflags\t\t: fpu avx2 avx\n", "A CPU @ 2 GHz", ["avx", "avx2"]),
        ("processor\t: 0\nFeatures\t: fp asimd sve\n", None, ["asimd", "sve"]),
        ("", None, []),
    ],
)
def test_processors_are_told_by_what_the_system_lists(
    listing: str, name: str | None, sets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_cpu_listing", lambda: listing)
    assert machine.instruction_sets() == sets
    assert machine.cpu_name() == name if name else machine.cpu_name()


def test_letters_that_the_terminal_lacks_are_written_as_escapes(tmp_path: Path) -> None:
    out, _ = finish(
        start_python(
            RUN, TORCH_EXTENSIONS_DIR=tmp_path / "cache \u65e5", PYTHONIOENCODING="latin-1", TRITON_INTERPRET=None
        )
    )
    assert "cache \\u65e5/emc2_kernels" in out
