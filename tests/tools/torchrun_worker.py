"""What test_torchrun.py has torchrun start, on a few images. At first it checks runs of two processes, and then its
second process is killed amid a run; started again, it goes on with that run, and is killed once more."""

import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from helpers import differences, relative_rms
from tqdm import tqdm

from emc2_kernels import checkpoint
from examples.pretrain import config, data, training
from examples.pretrain.__main__ import main
from examples.pretrain.processes import Processes
from examples.pretrain.run import Run

CPU = torch.device("cpu")
IMAGES = 66  # two batches of 33, which two processes cannot share equally
BASE = config.Config(dim=16, batch_size=33, epochs=3, device="cpu", quiet=True)
LONG = replace(BASE, epochs=4)
LONG_FLAGS = ["--dim=16", "--batch-size=33", "--epochs=4", "--device=cpu", "--quiet"]
CARRYING = {"burn_in": 0.0, "temperature": 0.05}  # chains then carry states that are samples
RUNS = [
    {"method": "simclr"},
    {"method": "simclr", "gather": "ring"},
    {"method": "simclr", "batching": "gcbs", "batch_size": 32},
    {"method": "emc2", "sampler": "mh"},
    {"method": "emc2", "sampler": "mh", "gather": "ring"},
    {"method": "emc2", "sampler": "isir"},
    {"method": "emc2", "carry": "recompute", **CARRYING},
    {"method": "emc2", "proposals": "bank"},
    {"method": "emc2", "proposals": "bank", "batching": "gcbs", "batch_size": 32},
    {"method": "sogclr"},
    {"method": "isogclr"},
    {"method": "cached"},
    {"method": "cached", "carry": "recompute"},
]


def few_images():
    split = data.digits()
    return split._replace(train_images=split.train_images[:IMAGES], train_labels=split.train_labels[:IMAGES])


def encode_plainly(run, items, views):
    """In the place of encode_again, whose augmentation each process draws for itself."""
    return run.encoder(run.split.train_images[items])


def gradient(run):
    return torch.cat([parameter.grad.flatten() for parameter in run.encoder.parameters()])


def chains(run):
    return [buffer for name, buffer in run.loss.state_dict().items() if name == "chains.key"]


def check_agreement(options, split, processes):
    """Each step in two processes, and in one from the same state: the same loss, gradient, and state of the loss."""
    together = Run(replace(BASE, **options), split, processes)
    alone = Run(replace(together.config, gather="none"), split)
    steps = ties = 0
    for _ in range(BASE.epochs):
        for part in together.batches():
            whole = torch.cat(processes.collect(part))
            assert len(whole) == together.config.batch_size and len(whole.unique()) == len(whole)
            alone.restore(together.state())
            value = processes.mean(together.train_step(part)["method_loss"].double())
            expected = alone.train_step(whole)["method_loss"].double()
            steps += 1
            if differences(chains(together), chains(alone)):  # a score within rounding of a tie
                ties += 1
                continue
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
            assert relative_rms(gradient(together), gradient(alone)) < 1e-4, options
            states = [run.loss.state_dict() for run in (together, alone)]
            for name, found in states[0].items():  # a bfloat16 bank may round another way
                torch.testing.assert_close(found, states[1][name], rtol=1e-2, atol=1e-4)
        together.epoch += 1
    assert steps == 6 and ties <= 1, options
    state = together.state()
    first, second = processes.collect([state[name] for name in ("encoder", "losses", "optimizer", "generators")])
    assert differences(first, second) == []


def check_own_chains(split, processes, directory):
    """With gather="none" each process has its own, and finds them again in the one checkpoint."""
    run, resumed = (Run(replace(BASE, **CARRYING, gather="none"), split, processes) for _ in range(2))
    with tqdm(disable=True) as progress:
        run.train_epoch(progress)
        run.save(directory / "own.pt")
        kept = processes.share_first(lambda: checkpoint.load(directory / "own.pt"))
        assert differences(*kept["losses"]) != []
        resumed.restore(kept)
        for each in (run, resumed):
            each.train_epoch(progress)
    states = [each.state() for each in (run, resumed)]
    for state in states:
        del state["seconds"], state["history"]
    assert differences(*states) == []


def check_first_error(processes):
    def fail():
        raise checkpoint.CheckpointError("damaged")

    try:
        processes.share_first(fail)
    except checkpoint.CheckpointError as error:
        assert str(error) == "damaged"
    else:
        raise AssertionError("no error")


def train_uninterrupted(split, processes, directory):
    """Keeps the checkpoint of each epoch."""
    run = Run(replace(LONG, out=str(directory / "whole")), split, processes)
    save = run.save

    def save_and_keep(path):
        save(path)
        if processes.first:
            shutil.copy(path, directory / f"{run.epoch}.pt")

    run.save = save_and_keep
    results = training._train(run)
    assert (results is not None) == processes.first


def check(directory):
    processes, split = Processes.launched(), few_images()
    encode_again = Run.encode_again
    # Any other number: the group of the run that is killed is the one of this attempt.
    with replace(processes, restarts=99).together(CPU):
        Run.encode_again = encode_plainly
        for options in RUNS:
            check_agreement(options, split, processes)
        Run.encode_again = encode_again
        check_own_chains(split, processes, directory)
        check_first_error(processes)
        train_uninterrupted(split, processes, directory)
    if processes.first:
        (directory / "checked").touch()


def wait_for_epoch(path, epoch):
    """Until the first process has written the checkpoint of that many epochs."""
    end = time.monotonic() + 60
    while not (path.exists() and checkpoint.load(path)["epoch"] == epoch):
        assert time.monotonic() < end, f"no checkpoint of epoch {epoch}"
        time.sleep(0.05)


def train_and_die(directory, epoch):
    """The second process is killed amid that epoch."""
    step = Run.train_step

    def killed(run, index):
        if run.epoch == epoch and not run.processes.first:
            wait_for_epoch(directory / "broken" / "checkpoint.pt", epoch)
            (directory / f"death {epoch}").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return step(run, index)

    Run.train_step = killed
    data.DATASETS["digits"] = few_images
    return main([*LONG_FLAGS, f"--out={directory / 'broken'}"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, restarted = Path(sys.argv[1]), Processes.launched().restarts > 0
    if not restarted:
        check(where)
    sys.exit(train_and_die(where, epoch=3 if restarted else 1))
