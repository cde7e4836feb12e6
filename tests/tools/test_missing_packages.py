"""Examples in an environment without their extra say which packages they expect, and how to install them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import examples

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
    for path in (ROOT / "examples").rglob("*.py")
    if "__main__" in path.read_text() and path.name != "quickstart.py"
)


def hide(folder: Path, *modules: str) -> dict[str, str]:
    """An environment in which Python finds none of these."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({modules!r}))\n")
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def test_the_programs_are_those_that_the_package_lists() -> None:
    assert set(re.findall(r"python -m (examples\.\S+)", examples.__doc__)) <= set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_names_what_is_missing_and_the_extra(program: str, tmp_path: Path) -> None:
    environment = hide(tmp_path, "jsonargparse", "sklearn")
    done = subprocess.run([sys.executable, "-m", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    expected = "examples: error: expected the packages jsonargparse, scikit-learn: "
    command = f'{shlex.quote(sys.executable)} -m pip install -e ".[examples]"\n'
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected + command)


def test_what_is_asked_for_is_what_they_import_and_the_extra_has() -> None:
    """Or a new import of theirs would be a traceback again."""
    text = (ROOT / "setup.py").read_text()
    extras = {name: re.findall(r'"([\w-]+)[>"]', re.search(rf"{name} = \[(.*?)\]", text, re.S)[1]) for name in
              ("BATCHING", "EXAMPLES")}  # fmt: skip
    assert set(examples.PACKAGES.values()) ^ {"torch", "mlxtend"} == {*extras["BATCHING"], *extras["EXAMPLES"]}
    imported = set()
    for path in (ROOT / "examples").rglob("*.py"):
        imported |= set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), flags=re.M))
    ours = {"examples", "emc2_kernels", "numpy", "__future__", *sys.stdlib_module_names}
    assert imported - ours <= set(examples.PACKAGES)
