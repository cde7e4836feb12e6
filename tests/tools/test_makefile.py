"""`make` keeps to its own .venv, and with ENV=none to the Python that it is given, where it installs nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def python(folder: Path, has_torch: bool) -> str:
    path = folder / ("with" if has_torch else "without")
    path.write_text("#!/bin/sh\necho 2.13.0\n" if has_torch else "#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return str(path)


def commands(checkout: Path, *arguments: str, **variables: str) -> list[str]:
    """What make would run."""
    usual = {name: value for name, value in os.environ.items() if name not in ("ENV", "MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=checkout, env=usual | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


STAMPS = {"examples": [".examples"], "docs": [".docs"], "test": [".test", ".examples", ".docs"]}


@pytest.mark.parametrize(
    ("target", "extra"), [("demo", "examples"), ("docs", "docs"), ("test", "test"), ("lint", "test")]
)
def test_targets_make_an_environment_with_what_they_need(checkout: Path, target: str, extra: str) -> None:
    """Also where the user's own has torch, and whatever a shell keeps in a variable named ENV."""
    given = python(checkout, has_torch=True)
    for variables in ({}, {"ENV": "/home/user/.shrc"}):
        made, installed, touched, *used = commands(checkout, target, f"PYTHON={given}", **variables)
        assert made == f"{given} -m venv .venv"
        assert installed.startswith(".venv/bin/python -m pip install ") and installed.endswith(f'-e ".[{extra}]"')
        assert "-c constraints.txt" in installed
        assert touched.split() == ["touch", *(f".venv/{stamp}" for stamp in STAMPS[extra])]
        assert used and all(line.split(" -m ")[0].endswith(".venv/bin/python") for line in used)
        assert commands(checkout, target, f"PYTHON={given}", "ENV=none", **variables) == [
            line.replace(".venv/bin/python", given) for line in used
        ]


def test_what_the_tests_need_is_enough_for_the_demo_and_the_pages(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    for stamp in STAMPS["test"]:
        (checkout / ".venv" / stamp).touch()
    assert commands(checkout, "demo") == [".venv/bin/python -m examples.demo"]
    assert len(commands(checkout, "docs")) == 1


def test_the_gpu_check_takes_an_environment_with_torch_as_it_is(checkout: Path) -> None:
    given = python(checkout, has_torch=True)
    assert commands(checkout, "gpu-check", f"PYTHON={given}") == [f"{given} -m bench.gpu.check"]
    *installs, used = commands(checkout, "gpu-check", f"PYTHON={python(checkout, has_torch=False)}")
    assert len(installs) == 3 and used == ".venv/bin/python -m bench.gpu.check"
