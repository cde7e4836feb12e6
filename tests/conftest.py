"""Without a GPU the Triton kernels run in Triton's interpreter, which must be said before they are imported."""

import functools
import os

import pytest
import ranks
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def over_ranks(tmp_path_factory):
    """over_ranks(size, check): what each of so many ranks has returned from a check of tests/support/ranks.py."""
    return functools.partial(ranks.found, folder=ranks.shared_folder(tmp_path_factory))


@pytest.fixture(scope="module")
def one_thread():
    from examples.pretrain.processes import cpu_threads

    with cpu_threads(1):
        yield
