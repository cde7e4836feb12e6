"""Measures candidates for the settings of the Triton kernels on the GPU that is here, and prints rows for settings.py.

    python bench/tune.py [--quick] [--json PATH]

Nothing of this runs in a user's program: what it prints is read, judged and typed into
`emc2_kernels/backends/triton/settings.py` by hand, with the GPU's name in the row's last field.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import Timer, cuda_timer, figures, interleave, summarize

ROOT = Path(__file__).resolve().parents[1]


class Shape(NamedTuple):
    """A walk to tune for; `draws` is None in a sweep."""

    dtype: torch.dtype
    n: int
    m: int
    d: int
    draws: int | None = None


SHAPES = [
    Shape(torch.bfloat16, 32768, 32768, 128),
    Shape(torch.bfloat16, 32768, 32768, 512),
    Shape(torch.bfloat16, 2048, 2048, 128),
    Shape(torch.bfloat16, 64, 1_000_000, 128),
    Shape(torch.float32, 8192, 8192, 128),
    Shape(torch.bfloat16, 32768, 1_000_000, 128, draws=256),
]
ROUNDS, FINALISTS = 9, 4


def sweep_candidates(settings: Any, shape: Shape) -> Iterator[Any]:
    """Few enough to compile in a minute or two; larger ones do not fit into registers or shared memory."""
    half = shape.dtype != torch.float32
    blocks_m, warps, stages = ((64, 128), (4, 8), (2, 3, 4)) if half else ((16, 32, 64), (4, 8), (2, 3))
    for block_m, block_d, num_warps, num_stages, registers in itertools.product(
        blocks_m, (32, 64, 128), warps, stages, (None, 168)
    ):
        rows_a_warp = block_m // num_warps
        whole = half and block_d >= shape.d
        if rows_a_warp < 16 and half or (block_d == 32 and half) or (whole and num_stages == 4):
            continue
        yield settings.Sweep(block_m, block_d, num_warps, num_stages, registers, "")


def gathered_candidates(settings: Any, shape: Shape) -> Iterator[Any]:
    for block_k, num_warps in itertools.product((16, 32, 64, 128), (1, 2, 4)):
        yield settings.Gathered(block_k, 256, num_warps, "")


CANDIDATES = {"sweep": sweep_candidates, "gathered": gathered_candidates}


def make_call(shape: Shape, device: torch.device) -> Callable[[], object]:
    """One step of such a walk on random unit vectors, with exclusions."""
    import emc2_kernels as emc2

    def unit(rows: int, seed: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        rows_of = torch.randn(rows, shape.d, device=device, generator=generator)
        return torch.nn.functional.normalize(rows_of).to(shape.dtype)

    queries, keys, state = unit(shape.n, 0), unit(shape.m, 1), emc2.init_state(shape.n, device)
    count = shape.m if shape.draws is None else shape.draws
    proposal = {} if shape.draws is None else {"proposal": "uniform", "num_proposals": shape.draws}
    ids = {"query_ids": torch.arange(shape.n, device=device), "key_ids": torch.arange(shape.m, device=device)}
    options = {"temperature": 0.07, "seed": 0, "step": 0, "burn_in": count // 2, "num_samples": min(16, count // 2)}
    return lambda: emc2.mh_step(queries, keys, state, backend="triton", **ids, **options, **proposal)


class Tuner:
    """Puts one candidate after the other in the place of the table's row."""

    def __init__(self, shape: Shape, device: torch.device, timer: Timer = cuda_timer) -> None:
        from emc2_kernels.backends.triton import settings

        self.settings, self.shape = settings, shape
        self.name = "sweep" if shape.draws is None else "gathered"
        self.table = getattr(settings, self.name)
        self.call, self.device, self.timer = make_call(shape, device), device, timer

    def with_settings(self, candidate: Any) -> Callable[[], object]:
        def call() -> object:
            setattr(self.settings, self.name, lambda *key: candidate)
            try:
                return self.call()
            finally:
                setattr(self.settings, self.name, self.table)

        return call

    def run(self, deadline: float) -> list[dict[str, Any]]:
        """The finalists, fastest first, with the row that is shipped among them."""
        make = CANDIDATES[self.name]
        generation = self.settings.device(self.device.index or 0)[0]
        half = self.shape.dtype != torch.float32
        shipped = (
            self.table(generation, half, self.shape.d, self.shape.n) if self.name == "sweep" else self.table(generation)
        )
        rough: dict[Any, float] = {}
        for candidate in (shipped, *make(self.settings, self.shape)):
            if time.monotonic() > deadline:
                print("  out of time: the rest of the candidates was not tried")
                break
            call = self.with_settings(candidate)
            try:
                call()  # compiles
                rough[candidate] = self.timer(call, 3)
            except Exception as error:  # a candidate that does not fit is none
                print(f"  {tuple(candidate[:-1])}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
        finalists = sorted(rough, key=rough.__getitem__)[:FINALISTS]
        calls = {str(tuple(one)): self.with_settings(one) for one in {*finalists, shipped} & rough.keys()}
        measured = interleave(calls, ROUNDS, timer=self.timer, budget_seconds=5.0)
        rows = [
            {"settings": name, "shipped": name == str(tuple(shipped)), **summarize(figures(seconds)).__dict__}
            for name, seconds in measured.seconds.items()
        ]
        return sorted(rows, key=lambda row: row["median"])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first two shapes only")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all shapes together")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        print("tune.py needs a CUDA GPU, and none is visible to torch", file=sys.stderr)
        return 1
    device, shapes = torch.device("cuda"), SHAPES[:2] if options.quick else SHAPES
    name, start = torch.cuda.get_device_name(), time.monotonic()
    print(f"{name}; last field of a row that is chosen: {name!r}")
    results = []
    for place, shape in enumerate(shapes, 1):
        print(f"{shape}")
        rows = Tuner(shape, device).run(start + 60 * options.minutes * place / len(shapes))
        for row in rows:
            mark = "  (shipped)" if row["shipped"] else ""
            spread = f"{row['lower_quartile'] * 1e3:.3f} .. {row['upper_quartile'] * 1e3:.3f}"
            print(f"  {row['median'] * 1e3:9.3f} ms  [{spread}]  {row['settings']}{mark}")
        results.append({"shape": [str(field) for field in shape], "rows": rows})
        torch.cuda.empty_cache()
    if options.json is not None:
        options.json.write_text(
            json.dumps({"gpu": name, "torch": torch.__version__, "shapes": results}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
