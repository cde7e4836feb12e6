"""Pre-trains an image encoder with a contrastive loss and says what its features are worth.

python examples/pretrain.py --data digits --method emc2
python examples/pretrain.py --config examples/configs/stl10.yaml --data stl10:PATH
torchrun --standalone --nproc-per-node 2 examples/pretrain.py --data digits --method emc2
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoint import load_checkpoint
from config import Config
from evaluate import FEW_LABELS, Accuracy, accuracy
from logs import TensorBoard, check_tensorboard, write_metrics
from plots import History, plot_curves
from processes import LostProcess, Processes
from sources import load as load_split
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from tracing import SKIPPED
from training import Run

from emc2_kernels.checkpoint import CheckpointError, load

CHECKPOINT, METRICS, CURVES = "checkpoint.pt", "metrics.csv", "curves.png"


@dataclass(frozen=True)
class Results:
    """seconds: training alone, without evaluation and checkpoints; history: the rows of metrics.csv; traced: what
    --profile has found."""

    accuracy: Accuracy
    history: History
    steps: int
    seconds: float
    paths: tuple[Path, ...]
    traced: str | None = None


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Limits PyTorch, and the BLAS below scikit-learn: with matrices this small, threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


def train(config: Config) -> Results | None:
    """One run, start to end or from its checkpoint; writes into `config.directory`. None in all processes but the
    first."""
    processes = Processes.launched()
    if config.tensorboard:
        check_tensorboard()
    with cpu_threads(config.threads), processes.together(config.torch_device):
        split = load_split(config.data, config.image_size, config.workers, config.subset)
        return _train(Run(config, split.to(config.torch_device), processes))


def state_to_go_on_from(config: Config, processes: Processes, path: Path) -> dict[str, Any] | None:
    """The checkpoint's, where asked for it and where torchrun has started the processes again; None: a fresh start."""
    if config.resume:
        return load_checkpoint(path, config.settings())
    # Of an older run it may still be, where processes ended before they could replace it.
    if processes.restarts and path.exists() and load(path).get("job") == processes.job:
        return load_checkpoint(path, config.settings())
    return None


def _train(run: Run) -> Results | None:
    config, processes = run.config, run.processes
    paths = tuple(config.directory / name for name in (CHECKPOINT, METRICS, CURVES))
    config.directory.mkdir(parents=True, exist_ok=True)
    state = processes.from_first(lambda: state_to_go_on_from(config, processes, paths[0]))
    if state is None:
        # Also replaces the checkpoint of an older run: --resume after an early interrupt must not continue that one.
        run.save(paths[0])
    else:
        try:
            run.restore(state)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{paths[0]}: expected a checkpoint of this version of the code: {error}") from error
        print(f"going on after epoch {run.epoch} of {paths[0]}", file=sys.stderr)
    board = TensorBoard(config.directory, run.step) if config.tensorboard and processes.first else None
    if config.amp == "float16":
        # A first step that is left out, as its gradients are beyond the range, is no mistake in the order of calls.
        warnings.filterwarnings("ignore", message="Detected call of .lr_scheduler.step")
    total = config.epochs * run.steps_per_epoch * config.batch_size
    options = {"unit": "image", "unit_scale": True, "mininterval": 1, "disable": config.quiet or not processes.first}
    bar = tqdm(total=total, initial=run.step * config.batch_size, desc=config.method, **options)
    with closing(run.tracer), bar as progress:
        while run.epoch < config.epochs:
            row = run.train_epoch(progress)
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(f"the loss is {row['loss']} in epoch {run.epoch}; a lower --lr may help")
            run.history.append(row)
            run.save(paths[0])
            if processes.first:
                write_metrics(paths[1], run.history)
                progress.set_postfix_str(progress_text(row))
                if board is not None:
                    board.write(row)
    if not processes.first:
        return None
    write_metrics(paths[1], run.history)
    data = config.data.partition(":")[0]
    plot_curves(paths[2], {config.method: run.history}, f"{config.method} on {data}, batch {config.batch_size}")
    found = accuracy(run.features(), config.probe, config.torch_device)
    if run.tracer.summary:
        paths += (run.tracer.path,)
    return Results(found, run.history, run.step, run.seconds, paths, run.tracer.summary)


def progress_text(row: dict[str, float]) -> str:
    knn = f", knn={row['few_nearest_neighbour']:.1%}" if "few_nearest_neighbour" in row else ""
    return f"ntxent={row['ntxent']:.3f}{knn}"


def main(arguments: Sequence[str] | None = None) -> int:
    from arguments import parse_arguments  # here: scripts that call `train` do without a parser and its package

    processes, stderr = Processes.launched(), sys.stderr
    with processes.only_first_prints():
        config = parse_arguments(arguments)
        try:
            results = train(config)
        except KeyboardInterrupt:
            print(f"\ninterrupted; {config.directory / CHECKPOINT} holds the last whole epoch: add --resume to go on")
            return 130
        except (CheckpointError, FloatingPointError, ImportError, LostProcess, OSError, ValueError) as error:
            # Whichever process it is: the others may only see that it is gone.
            stderr.write(f"pretrain.py: error: {processes.name}{error}\n")
            return 2
        if results is not None:
            report(config, results)
    return 0


def report(config: Config, results: Results) -> None:
    found = results.accuracy
    print(f"{config.method}: {results.steps} steps of {config.batch_size} images, {results.seconds:.1f} s of training")
    print("accuracy on held-out images     linear probe    1-NN   10-NN")
    every = (found.linear_probe, found.nearest_neighbour, found.ten_nearest_neighbours)
    print(f"  all training labels           {every[0]:12.1%}  {every[1]:6.1%}  {every[2]:6.1%}")
    print(
        f"  {FEW_LABELS} labels a class             {found.few_linear_probe:12.1%}  {found.few_nearest_neighbour:6.1%}"
    )
    if config.profile:
        print(results.traced or f"no trace: fewer than {config.profile + SKIPPED} steps were left")
    print("written: " + ", ".join(str(path) for path in results.paths))


if __name__ == "__main__":
    sys.exit(main())
