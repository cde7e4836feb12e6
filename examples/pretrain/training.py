"""One run from start to end, or from its checkpoint: what it trains, evaluates and writes."""

from __future__ import annotations

import math
import sys
import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emc2_kernels.checkpoint import CheckpointError, load
from examples.pretrain.config import Config
from examples.pretrain.data import load as load_split
from examples.pretrain.evaluate import Accuracy, accuracy
from examples.pretrain.processes import Processes, cpu_threads
from examples.pretrain.report import History, TensorBoard, check_tensorboard, plot_curves, write_metrics
from examples.pretrain.run import Run, load_checkpoint

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


def train(config: Config) -> Results | None:
    """One run, start to end or from its checkpoint; writes into `config.directory`. None in all processes but the
    first."""
    processes = Processes.launched()
    if config.tensorboard:
        check_tensorboard()
    with cpu_threads(config.threads), processes.together(config.torch_device):
        split = load_split(config.data, config.image_size, config.workers, config.subset)
        return _train(Run(config, split.to(config.torch_device), processes))


def find_state(config: Config, processes: Processes, path: Path) -> dict[str, Any] | None:
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
    state = processes.share_first(lambda: find_state(config, processes, paths[0]))
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
            if not math.isfinite(row["method_loss"]):
                raise FloatingPointError(
                    f"the loss is {row['method_loss']} in epoch {run.epoch}; a lower --lr may help"
                )
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
