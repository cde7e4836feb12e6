"""The code of the guide's pages runs as it stands, each page by itself; and what its shell lines name is there."""

import functools
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OTHERS = {
    "frameworks.md",
    "chosen-batches.md",
}  # test_frameworks_page.py runs them by section, and looks at what they did
FOLDERS = (DOCS, DOCS / "guide", DOCS / "development")
PAGES = [page for folder in FOLDERS for page in sorted(folder.glob("*.md")) if page.name not in OTHERS]
PAGES.append(ROOT / "README.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page, *languages):
    """Their text, and the line of the page on which it begins."""
    text = page.read_text()
    return [(b[2], text.count("\n", 0, b.start(2))) for b in BLOCK.finditer(text) if b[1] in languages]


def named(page):
    return str(page.relative_to(ROOT))


def test_every_page_of_the_guide_is_run_somewhere():
    run = {page.name for page in PAGES if page.parent.name == "guide"}
    assert {page.name for page in (DOCS / "guide").glob("*.md")} == run | OTHERS
    assert sum(len(blocks(page, "python")) for page in PAGES) > 15


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=named)
def test_the_page_runs_from_top_to_bottom(page, monkeypatch, tmp_path):
    """In one namespace and an empty folder; an error has the page's line."""
    monkeypatch.chdir(tmp_path)
    # Other backends have tests of their own, and take longer than all of this.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    if "init_process_group" in page.read_text():
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
            monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    names = {"__name__": "page"}
    try:
        for code, line in blocks(page, "python"):
            exec(compile("\n" * line + code, page, "exec"), names)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_an_error_of_a_page_is_an_error(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        test_the_page_runs_from_top_to_bottom(page, monkeypatch, tmp_path)
    assert caught.traceback[-1].lineno + 1 == 10


def missing_of(line, targets):
    """What a shell line names that is not there."""
    for module in re.findall(r"\s-m ([\w.]+)", line):
        found = importlib.util.find_spec(module)
        if found is not None and found.submodule_search_locations:  # a package is run by its __main__
            found = importlib.util.find_spec(module + ".__main__")
        if found is None:
            yield f"module {module}"
    for script in re.findall(r"python (\S+\.py)\b", line):
        if not (ROOT / script).is_file():
            yield f"file {script}"
    for words in re.findall(r"(?:^|[;&|] *)make((?: [a-z-]+)+)", line):
        yield from (f"target {word}" for word in words.split() if word not in targets)


TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("page", [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"], ids=named)
def test_what_shell_lines_name_is_there(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    lines = [line for text, _ in blocks(page, "sh", "bash") for line in text.replace("\\\n", " ").splitlines()]
    lines += [code for code in re.findall(r"`([^`\n]+)`", page.read_text()) if re.match(r"(make|python) ", code)]
    assert [missing for line in lines for missing in missing_of(line, TARGETS)] == []


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("make test", []),
        ("make tests", ["target tests"]),
        (".venv/bin/python -m examples.demo --quick", []),
        ("python -m examples.gone", ["module examples.gone"]),
        ("python -m examples.two_towers --data digits", ["module examples.two_towers"]),
        ("torchrun --standalone -m examples.pretrain", []),
        ("python examples/quickstart.py", []),
        ("python examples/slowstart.py", ["file examples/slowstart.py"]),
    ],
)
def test_what_is_missing_is_found(line, missing, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    assert list(missing_of(line, TARGETS)) == missing
