"""Examples, run from the root of the checkout.

python examples/quickstart.py                   a training loop of forty lines, to be read first
python -m examples.demo                         EMC² beside SimCLR on real digits, in about a minute (make demo)
python -m examples.pretrain                     any method on any data set, alone or under torchrun
python -m examples.two_towers.halves            two modalities: a digit's left half finds its right half
python -m examples.two_towers.gcbs              batches chosen over the whole data set, beside random ones
python -m examples.two_towers.finetune_verses   the same in sentence-transformers' trainer
python -m examples.study                        the papers' claims, measured: docs/results/claims.md
python -m examples.study.gradient_bias          error of each method's mean gradient: docs/results/gradients.md
python -m examples.study.global_loss            what training makes of the global loss: docs/results/gradients.md
python -m examples.study.compare_methods        accuracy, time and memory of all methods: docs/results/accuracy.md
"""

import shlex
import sys
from importlib.util import find_spec

# What all of them import, and its packages: torch, and those of setup.py's extra. What only some need is asked for
# where it is used.
PACKAGES = {
    "torch": "torch",
    "jsonargparse": "jsonargparse",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "threadpoolctl": "threadpoolctl",
    "tqdm": "tqdm",
}


def install(extra: str) -> str:
    """The command that installs one of setup.py's extras, in the checkout."""
    return f'{shlex.quote(sys.executable)} -m pip install -e ".[{extra}]"'


_missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
if _missing:  # they are programs: a line and no traceback
    raise SystemExit(f"examples: error: expected the packages {', '.join(_missing)}: {install('examples')}")
