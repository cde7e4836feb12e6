"""Run by every rank (see ranks.py): GlobalContrastiveBatchSampler in loaders of frameworks that shard data themselves.

Each check returns the batches that this rank has trained on, or the error that it got. Frameworks are imported here,
once for all ranks, which are forked from the process that does; a test imports nothing of this.
"""

import contextlib
import importlib
import os
from functools import partial

import torch
from torch.utils.data import DataLoader

from emc2_kernels.batching import GlobalContrastiveBatchSampler

ITEMS, SIZE, EPOCHS = 50, 4, 2  # as in test_batching_frameworks.py
FRAMEWORKS = []  # that are installed
for name in ("accelerate", "transformers.trainer", "lightning"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
        FRAMEWORKS.append(name)
SAMPLERS = {"own": {}, "all": {"rank": "all"}, "all, drop_last": {"rank": "all", "drop_last": True}}


def found(call):
    try:
        return call()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def loader(sampler):
    return DataLoader(torch.arange(ITEMS), batch_sampler=sampler)


def accelerated(sampler, **options):
    """Two passes, the first of which is given up after two batches; ``sampler`` makes one or is one."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
    batches = accelerator.prepare(loader(sampler))
    return [
        [batch.tolist() for batch, _ in zip(batches, range(2), strict=False)],
        [batch.tolist() for batch in batches],
    ]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, item):
        self.seen.append(item.tolist())
        return {"loss": (self.weight * item.float()).sum()}


def hugging_face(folder, **options):
    from transformers import Trainer, TrainingArguments

    class GCBSTrainer(Trainer):
        def get_train_dataloader(self):
            sampler = GlobalContrastiveBatchSampler(len(self.train_dataset), SIZE, **options)
            loader = DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}
    arguments = TrainingArguments(folder, num_train_epochs=EPOCHS, use_cpu=True, **quiet)
    rows, collate = [{"item": item} for item in range(ITEMS)], torch.utils.data.default_collate
    trainer = GCBSTrainer(model=Model(), args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    return trainer.model.seen


def lightning(hook, use_distributed_sampler, **options):
    """``hook``: whether the loader is made in train_dataloader, as the group is there by then."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

        def train_dataloader(self):
            return loader(GlobalContrastiveBatchSampler(ITEMS, SIZE))

        def training_step(self, batch, number):
            self.seen.append(batch.tolist())
            return (self.weight * batch.float()).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "use_distributed_sampler": use_distributed_sampler}
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=EPOCHS, **quiet, **options)
    trainer.fit(module, None if hook else module.train_dataloader())
    return module.seen


def checks(rank, size):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in place.items()}  # as torchrun; the group is there already
    named = {}
    if "accelerate" in FRAMEWORKS:
        for kind, options in SAMPLERS.items():
            for dispatch in (False, True):
                sampler = partial(GlobalContrastiveBatchSampler, ITEMS - dispatch * ITEMS % (SIZE * size), SIZE)
                call = partial(accelerated, sampler(**options), dispatch_batches=dispatch)
                named[f"accelerate: {kind}" + ", dispatched" * dispatch] = call
    if "transformers.trainer" in FRAMEWORKS:
        named |= {f"trainer: {kind}": partial(hugging_face, "unused", **SAMPLERS[kind]) for kind in SAMPLERS}
    if "lightning" in FRAMEWORKS:
        named |= {
            "lightning: sampler injected": partial(lightning, True, True),
            "lightning: sampler injected into a loader": partial(lightning, False, True),
            "lightning": partial(lightning, True, False),
            "lightning: limited": partial(lightning, True, False, limit_train_batches=2),
        }
    return {name: partial(found, call) for name, call in named.items()}
