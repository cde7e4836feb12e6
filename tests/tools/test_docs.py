"""The documentation builds without a warning, and describes every argument of what is public; no table is too wide."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import griffe
import pytest
from test_layers import LAYERS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
MOST_COLUMNS = 6  # that fit a page's column of text
LONGEST_CELL = 120  # characters of the source; a cell of more is a paragraph, which a table makes hard to read
FETCHED = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=["']?(?:https?:)?//[^>]*>""")
REFERENCE = re.compile(r"^::: (\S+)(?:\n    options: \{.*?members: \[(.*?)\])?", re.M)
# Their arguments are their base class's, as their docstrings say.
INHERITED = {"ClipLoss"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built pages, and what the build said."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return folder, subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_site_builds_without_a_warning(site):
    folder, built = site
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    for page in PAGES[:-1]:
        assert (folder / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file()


def test_the_pages_fetch_nothing_from_elsewhere(site):
    """Scripts, style sheets, fonts and images; a link that a reader follows is another matter."""
    pages = list(site[0].rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    for page in pages:
        assert not FETCHED.findall(page.read_text()), page.name


def rows(page):
    """Lines of tables by number, as their cells."""
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if line.startswith("|") and not fenced:
            shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line)  # of a link, its text
            yield number, [cell.strip() for cell in re.split(r"(?<!\\)\|", shown)[1:-1]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_fit_a_page(page):
    tables = list(rows(page))
    assert [number for number, row in tables if len(row) > MOST_COLUMNS] == []
    assert [number for number, row in tables if max(map(len, row)) > LONGEST_CELL] == []


def test_the_readme_is_short():
    assert len(PAGES[-1].read_text().splitlines()) <= 130


def test_the_picture_of_the_layers_is_of_the_layers():
    """In their order, and made by the script that is there."""
    drawn = runpy.run_path(str(ROOT / "docs" / "images" / "layers.py"))["ROWS"]
    rows = [{name.replace("emc2_kernels", "") for name, _ in row} for row in reversed(drawn)]
    assert rows == [set(names) for names in LAYERS]
    made = (ROOT / "docs" / "images" / "layers.svg").read_text()
    assert all(f"<!-- {name} -->" in made for row in drawn for name, _ in row)


@pytest.fixture(scope="module")
def package():
    return griffe.load("emc2_kernels", search_paths=[ROOT], allow_inspection=False, resolve_aliases=True)


def documented(package):
    """What the reference has, and the names of its methods that are shown, if not all; by its path."""
    found = {}
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        for path, members in REFERENCE.findall(page.read_text()):
            found[path] = resolved(package, path), [name.strip() for name in members.split(",")] if members else None
    return found


def resolved(package, path):
    target = package[path.removeprefix("emc2_kernels.")]
    return target.final_target if target.is_alias else target


def test_the_reference_has_what_the_package_exports(package):
    exported = {f"emc2_kernels.{name}" for name in package.exports}
    for module in ("losses", "batching"):
        exported |= {f"emc2_kernels.{module}.{name}" for name in package[module].exports}
    exported |= {f"emc2_kernels.checkpoint.{name}" for name in package["checkpoint"].exports}
    shown = {target.path for target, _ in documented(package).values()}
    targets = [resolved(package, path) for path in sorted(exported)]
    assert len(targets) > 30
    assert not [
        target.path for target in targets if not (target.is_module or target.is_attribute or target.path in shown)
    ]


def described(target):
    """Names in the docstring's sections of arguments and attributes."""
    names = {"parameters": [], "attributes": []}
    if target.docstring is not None:
        for section in target.docstring.parse("google", warnings=False):
            if section.kind.value in names:
                names[section.kind.value] += [entry.name for entry in section.value]
    return names


def test_every_argument_is_described_by_itself(package):
    wrong = {}
    for path, (target, members) in documented(package).items():
        for name, each in [(path, target), *public_methods(path, target, members)]:
            if each.name in INHERITED:
                continue
            takes = [p.name for p in parameters(each) if p.name not in ("self", "cls")]
            has = [argument.lstrip("*") for argument in described(each)["parameters"]]
            if sorted(takes) != sorted(has):
                wrong[name] = sorted({*takes} ^ {*has})
    assert not wrong


def test_every_field_of_a_result_is_described(package):
    tuples = [target for target, _ in documented(package).values() if is_tuple(target)]
    assert len(tuples) >= 8
    for target in tuples:
        fields = [name for name, member in target.members.items() if member.is_attribute]
        assert described(target)["attributes"] == fields, target.path


def is_tuple(target):
    return target.is_class and any("NamedTuple" in str(base) for base in target.bases)


def public_methods(path, target, members):
    """Those with a docstring, as the pages show no others."""
    for name, member in target.members.items() if target.is_class else ():
        shown = not name.startswith("_") if members is None else name in members
        if shown and member.is_function and member.docstring is not None:
            yield f"{path}.{name}", member


def parameters(target):
    if target.is_function:
        return target.parameters
    if is_tuple(target):
        return []
    constructor = target.members.get("__init__")
    return [] if constructor is None else constructor.parameters
