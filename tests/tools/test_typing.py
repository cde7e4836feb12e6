"""The types of the public API, as a user's checker sees them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typed_usage

ROOT = Path(__file__).resolve().parents[2]


def test_a_typed_program_runs(tmp_path: Path) -> None:
    typed_usage.main(tmp_path)


def test_mypy_sees_the_types_of_the_public_api_and_mistakes() -> None:
    """What mypy finds within the package is not the user's affair: its files are followed in silence."""
    command = (sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary")
    cache = ("--cache-dir", ROOT / ".mypy_cache")
    done = subprocess.run([*command, *cache, typed_usage.__file__], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
