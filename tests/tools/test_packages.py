"""What is published: a wheel that works away from the checkout, an sdist that makes the same wheel, a description that
needs no files beside it."""

from __future__ import annotations

import email
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

import emc2_kernels
from emc2_kernels import losses

ROOT = Path(__file__).resolve().parents[2]
NOT_TRACKED = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__")

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler to build with"
)


class Packages(NamedTuple):
    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


def run(*command: str | Path, cwd: Path, **variables: str | Path) -> str:
    """Standard output, with nothing of this checkout on Python's path."""
    usual = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX", "EMC2_ARCH")}
    environment = usual | {name: str(value) for name, value in variables.items()}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """Built of a copy, as setuptools writes into the folder that it builds."""
    folder = tmp_path_factory.mktemp("packages")
    copy = folder / "checkout"
    ignored = shutil.ignore_patterns(*NOT_TRACKED, "tests", "bench", "docs")
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / "tests" / "losses").mkdir(parents=True)
    (copy / "tests" / "losses" / "test_x.py").touch()
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    run(*build, folder / "direct", "--wheel", copy, cwd=folder)
    run(*build, folder / "dist", copy, cwd=folder)  # the sdist, and a wheel of that
    (wheel,), (sdist,), (again,) = (folder.glob(pattern) for pattern in ("direct/*.whl", "dist/*.tar.gz", "dist/*.whl"))
    return Packages(wheel, sdist, again)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def checkout_files() -> set[str]:
    """As the wheel names them: the package's modules, and what is compiled."""
    python = {path.relative_to(ROOT).as_posix() for path in (ROOT / "emc2_kernels").rglob("*.py")}
    kernels = [path for folder in ("csrc", "python_bindings") for path in (ROOT / folder).rglob("*.*")]
    return python | {f"emc2_kernels/_sources/{path.relative_to(ROOT).as_posix()}" for path in kernels}


def test_the_wheel_holds_the_package_its_kernels_and_nothing_else(packages: Packages) -> None:
    names = set(contents(packages.wheel))
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == checkout_files() | {"emc2_kernels/py.typed"}
    assert "licenses/LICENSE" in {name.partition(".dist-info/")[2] for name in about}
    assert packages.wheel.name == f"emc2_kernels-{emc2_kernels.__version__}-py3-none-any.whl"


def test_a_wheel_of_the_sdist_is_that_of_the_checkout(packages: Packages) -> None:
    assert contents(packages.wheel_of_sdist) == contents(packages.wheel)
    with tarfile.open(packages.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "bench", "examples", "docs")]


def test_the_description_needs_no_files_beside_it(packages: Packages) -> None:
    (metadata,) = (text for name, text in contents(packages.wheel).items() if name.endswith("/METADATA"))
    parsed = email.message_from_bytes(metadata)
    assert parsed["License-Expression"] == "Apache-2.0"
    assert parsed["Description-Content-Type"] == "text/markdown"
    text = parsed.get_payload(decode=True).decode()
    readme = (ROOT / "README.md").read_text()
    assert text.startswith(readme.partition("\n")[0])
    fence = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    assert fence.findall(text) == fence.findall(readme) != []  # code is as it was
    prose = fence.sub("", text)
    assert re.findall(r"!\[|<img|<a ", prose) == []
    images = re.findall(r"!\[([^\]]+)\]", readme)
    assert images and not [image for image in images if image in prose]
    links = re.findall(r"\]\(([^)]*)\)", prose) + re.findall(r"^\[[^\]]*\]:\s*(\S+)", prose, re.MULTILINE)
    assert links and all(link.startswith("https://") for link in links), links
    relative = re.findall(r"(?<!!)\[([^\]]+)\]\((?!https:)[^)]+\)", fence.sub("", readme))
    assert relative and all(words in prose for words in relative)


SMOKE = """
import json, pathlib, torch, emc2_kernels
from emc2_kernels.losses import EMC2Loss

def step(backend):
    torch.manual_seed(0)
    loss_fn = EMC2Loss(12, 16, temperature=0.2, backend=backend)
    losses = []
    for index in (torch.arange(8), torch.arange(4, 12), torch.arange(8)):
        z0, z1 = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
        loss = loss_fn(z0, z1, index)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), z0.grad, z1.grad

for found, expected in zip(step("cpu"), step("reference")):
    assert found.isfinite().all() and found.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
print(json.dumps({"file": emc2_kernels.__file__, "torch": torch.__file__, "cpu": emc2_kernels.backends()["cpu"]}))
"""


@needs_compiler
def test_the_wheel_compiles_and_trains_in_another_environment(packages: Packages, tmp_path: Path) -> None:
    """With this environment's torch, as its installation is not what is tested."""
    home, cache = tmp_path / "elsewhere", tmp_path / "cache"
    home.mkdir()
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python3.*/site-packages")
    needed = (importlib.import_module(name) for name in ("torch", "numpy", "pybind11"))
    (site / "needed.pth").write_text("".join(f"{Path(module.__file__).parents[1]}\n" for module in needed))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", "--quiet")
    run(*pip, packages.wheel, cwd=home)
    found = json.loads(run(python, "-c", SMOKE, cwd=home, TORCH_EXTENSIONS_DIR=cache))
    assert Path(found["file"]).is_relative_to(site)
    assert found["torch"] == torch.__file__ and found["cpu"] == "available"
    (core,) = cache.glob("emc2_kernels/*/emc2_cpu.so")
    assert core.stat().st_size > 100_000


def test_the_citation_is_of_this_version_and_whole() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software" and cited["message"]
    assert str(cited["version"]) == emc2_kernels.__version__
    assert [author["name"] for author in cited["authors"]] == ["The emc2_kernels authors"]
    for paper in cited["references"]:
        assert paper["type"] and paper["title"] and paper["url"].startswith("https://")
        assert paper["authors"] and all(set(author) == {"family-names", "given-names"} for author in paper["authors"])
        for name in re.findall(r"\w+Loss|\w+_step|\w+Sampler", paper["notes"]):  # of this library
            assert any(hasattr(place, name) for place in (emc2_kernels, losses, emc2_kernels.batching)), name


def test_the_changelog_has_this_version() -> None:
    assert f"\n## {emc2_kernels.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["bug", "question"])
def test_issues_ask_for_the_machine(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"] and form["description"]
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"]) and all(field["attributes"]["label"] for field in fields.values())
    assert "python -m emc2_kernels" in fields["machine"]["attributes"]["label"]
    assert fields["machine"]["validations"]["required"]
