"""The package has layers: no module imports one of a higher layer, at any place in it, and no two import each other."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import emc2_kernels

PACKAGE = Path(emc2_kernels.__file__).parent
LAYERS = [  # from the bottom; a package is a layer with all that is in it
    ("dispatch", "files", "rng", "autograd"),
    ("checks", "checkpoint"),
    ("transition", "data"),
    ("backends",),
    ("ops",),
    ("mh", "lse", "gumbel"),
    ("isir",),
    ("distributed",),
    ("stores",),
    ("losses",),
    ("batching",),
    ("adapters",),
    ("",),  # the package itself
    ("machine",),
    ("__main__",),
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def module_of(path, package=PACKAGE):
    """Its dotted name below the package, "" for the package itself."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path, modules, package=PACKAGE):
    """The package's modules that a file imports, inside functions and for types, too."""
    parts = path.relative_to(package).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
            base = ".".join(filter(None, base))
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                yield inner if inner in modules else base
        else:
            named = [node.module] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any((name or "").split(".")[0] == "emc2_kernels" for name in named), f"{path}: absolute import"


def graph_of(package=PACKAGE):
    modules = {module_of(path, package): path for path in package.rglob("*.py")}
    return {name: set(imports_of(path, modules, package)) - {name} for name, path in modules.items()}


GRAPH = graph_of()


def test_every_module_has_a_layer():
    assert {name.split(".")[0] for name in GRAPH} == set(LAYER)


def test_no_arrow_points_upward():
    def layer(name):
        return LAYER[name.split(".")[0]]

    upward = [f"{name} -> {other}" for name, others in GRAPH.items() for other in others if layer(other) > layer(name)]
    assert upward == []
    across = [
        f"{name} -> {other}"
        for name, others in GRAPH.items()
        for other in others
        if layer(other) == layer(name) and other.split(".")[0] != name.split(".")[0]
    ]
    assert across == []


def test_no_modules_import_each_other():
    list(TopologicalSorter(GRAPH).static_order())


@pytest.mark.parametrize(
    ("files", "cycle"),
    [
        ({"a.py": "from . import b", "b.py": "def f():\n    from .a import g"}, True),
        ({"a.py": "from .c.d import x", "c/__init__.py": "", "c/d.py": "from .. import a"}, True),
        ({"a.py": "from .b import x", "b.py": "import math"}, False),
    ],
)
def test_a_circle_is_found(files, cycle, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    if cycle:
        with pytest.raises(CycleError):
            list(TopologicalSorter(graph_of(tmp_path)).static_order())
    else:
        list(TopologicalSorter(graph_of(tmp_path)).static_order())
