"""What holds for all adapters: importing them imports no framework, and values are those of the losses inside."""

import subprocess
import sys

import torch
from helpers import named_error, normal

from emc2_kernels.adapters.base import Adapter
from emc2_kernels.losses import EMC2Loss, NTXentLoss

FRAMEWORKS = ("datasets", "lightly", "open_clip", "pytorch_metric_learning", "sentence_transformers", "transformers")


def test_no_framework_is_imported_before_it_is_needed():
    """Nor an adapter with the package."""
    code = f"""
import sys
import emc2_kernels
assert not any(name.startswith("emc2_kernels.adapters") for name in sys.modules)
import emc2_kernels.adapters.open_clip, emc2_kernels.adapters.metric_learning
print([name for name in {FRAMEWORKS} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_statistics_are_those_of_the_latest_call():
    adapter, index = Adapter(EMC2Loss(9, 4, temperature=0.3), report=True), torch.tensor([2, 5, 8])
    for step in range(3):
        value = adapter.value_of(normal(step, 3, 4).requires_grad_(), normal(9, 3, 4), index)
        in_batch = NTXentLoss(temperature=0.3)(normal(step, 3, 4), normal(9, 3, 4))
        torch.testing.assert_close(adapter.stats["ntxent"], in_batch)
        assert value.requires_grad and not any(stat.requires_grad for stat in adapter.stats.values())
    assert adapter.keeps_items and not Adapter(NTXentLoss()).keeps_items
    assert adapter.state_dict().keys() == {f"loss.{name}" for name in adapter.loss.state_dict()}


def test_what_is_no_loss():
    with named_error(TypeError, "loss must be a loss of emc2_kernels.losses"):
        Adapter(torch.nn.functional.cross_entropy)
    with named_error(TypeError, "report must be"):
        Adapter(NTXentLoss(), report=None)
