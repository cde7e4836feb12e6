"""What a process builds or imports, looked at in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import emc2_kernels


def environment(**changes: str | Path | None) -> dict[str, str]:
    """This process's environment with changes; None removes a variable."""
    package = Path(emc2_kernels.__file__).parents[1]
    changed = {**os.environ, "CXX": None, "TORCH_EXTENSIONS_DIR": None, "PYTHONPATH": package, **changes}
    return {name: str(value) for name, value in changed.items() if value is not None}


def start_python(
    code: str, *arguments: str | Path, stdin: int | None = None, **changes: str | Path | None
) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment(**changes),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that it can be killed together with the compilers that it started
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """Standard output and error of a process that must succeed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out, err


def run_checked(*command: str | Path, **changes: str | Path | None) -> str:
    done = subprocess.run(
        list(map(str, command)), env=environment(**changes), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


# Steps with each backend that argv names; what came of them as JSON, for each call "ok" or the error's type and text.
STEPS = """
import json, sys, warnings
import torch, emc2_kernels

def attempt(backend, dtype=torch.float32):
    queries, keys = torch.ones(3, 4, dtype=dtype), torch.ones(5, 4, dtype=dtype)
    try:
        emc2_kernels.mh_step(
            queries, keys, emc2_kernels.init_state(3), temperature=0.5, seed=1, step=0, backend=backend
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"

def attempt_all(names):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = emc2_kernels.backends()
        calls = [attempt(backend) for backend in names]
        if "auto" in names:
            calls.append(attempt("auto", torch.bfloat16))  # another choice of backend, by the same facts
    return {
        "calls": calls,
        "warnings": [[warning.category.__name__, str(warning.message)] for warning in caught],
        "before": before,
        "after": emc2_kernels.backends(),
    }

if __name__ == "__main__" and sys.argv[1:]:
    print(json.dumps(attempt_all(sys.argv[1:])))
"""

# The same in many surroundings, each in a process forked from one that has imported the library. Standard input has
# them, by name: variables (null: removed), the user's id, the most bytes of a file, what importing Triton raises.
MANY_STEPS = (
    STEPS
    + """
import builtins, os, resource
import emc2_kernels.backends.cpu, emc2_kernels.backends.reference
from emc2_kernels.backends.cpu import build

class Broken:
    def __init__(self, error):
        self.error = getattr(builtins, error)
    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            raise self.error("planted")

def surrounded(variables, user, limit, triton, names):
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if triton is not None:
        sys.meta_path.insert(0, Broken(triton))
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if user is not None:  # who need not be able to read this checkout
        *_, key, name = build._library_path().parts
        build._extension.path = lambda: build.cache_root() / key / name
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    return attempt_all(names)

found = {}
for case, arguments in json.load(sys.stdin).items():
    reads, writes = os.pipe()
    if os.fork() == 0:
        try:
            os.write(writes, json.dumps(surrounded(*arguments)).encode())
        except BaseException as error:
            os.write(writes, json.dumps(f"{type(error).__name__}: {error}").encode())
        os._exit(0)
    os.close(writes)
    with open(reads) as answer:
        found[case] = json.load(answer)
print(json.dumps(found))
"""
)


class Outcome(NamedTuple):
    calls: list[str]
    warnings: list[list[str]]
    before: dict[str, str]
    after: dict[str, str]
    err: str


def outcome(process: subprocess.Popen) -> Outcome:
    out, err = finish(process)
    return Outcome(**json.loads(out), err=err)


def check_fallback(result: Outcome, backends: list[str], reason: str) -> None:
    """Each "auto" worked, with one warning in all; each "cpu" is a RuntimeError; both, and the table, say why."""
    assert [call for call, backend in zip(result.calls, backends, strict=True) if backend == "auto"] == [
        "ok"
    ] * backends.count("auto")
    for call in (call for call, backend in zip(result.calls, backends, strict=True) if backend == "cpu"):
        assert call.startswith("RuntimeError: ")
        assert reason in call
    ((category, message),) = result.warnings
    assert category == "RuntimeWarning"
    assert reason in message
    assert "reference" in message
    assert reason in result.after["cpu"]
    assert result.after["reference"] == "available"
