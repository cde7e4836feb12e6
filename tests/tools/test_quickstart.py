"""The quickstart: short enough to be read whole, and what it prints goes the right way."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.py"


def test_it_is_read_whole_and_needs_no_other_example():
    text = QUICKSTART.read_text()
    assert len(text.splitlines()) <= 40
    assert set(re.findall(r"^(?:from|import) (\w+)", text, flags=re.M)) == {"torch", "emc2_kernels"}


def test_training_lowers_ntxent_and_the_mean_cosine():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, QUICKSTART], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    values = [tuple(map(float, found)) for found in re.findall(r"NT-Xent (\S+), mean cosine (\S+)", done.stdout)]
    (first, start), *_, (last, end) = values
    assert len(values) == done.stdout.count("epoch") > 1
    assert last < 0.6 * first and abs(end) < 0.1 < start
