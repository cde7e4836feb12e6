"""What test_compiled.py allows a (case of bench/gpu/compiled.py, generation, kernel), its launches taken together.

A bound is what was seen when it was written, and a little: more means that something got worse. After a change that is
meant, `python -m bench.gpu.compiled --bounds --cases ... --generations ...` prints these lines anew.
"""

from typing import NamedTuple


class Bound(NamedTuple):
    registers: int
    stack: int  # bytes of a thread in slow memory, for what did not fit into registers
    shared: int  # bytes of a program
    # For each element, as bench/gpu/sass.py defines them. Where one product takes whole rows (d = 128 on sm_90), the
    # loads of the next tile are among the counted instructions.
    issue: float | None = None
    cycles: float | None = None


BOUNDS = {
    ("sweep d=128", 90, "sweep_kernel.walk"): Bound(240, 0, 99328, 29.5, 34.5),
    ("sweep d=128", 90, "replay_kernel"): Bound(255, 64, 54272),
    ("sweep d=128", 80, "sweep_kernel.walk"): Bound(255, 48, 54272, 24.0, 27.0),
    ("sweep d=128", 80, "replay_kernel"): Bound(255, 32, 54272),
    ("sweep d=128", 80, "epilogue_kernel"): Bound(160, 0, 1024),
    ("sweep d=128", 100, "sweep_kernel.walk"): Bound(255, 0, 95232, 23.0, 27.0),
    ("sweep d=128", 100, "replay_kernel"): Bound(255, 144, 54272),
    ("sweep d=128", 100, "epilogue_kernel"): Bound(160, 0, 1024),
    ("sweep d=512", 90, "sweep_kernel.walk"): Bound(248, 0, 108544, 23.5, 29.5),
    ("sweep d=512", 90, "replay_kernel"): Bound(255, 16, 108544),
    ("sweep d=128, no ids", 90, "sweep_kernel.walk"): Bound(248, 0, 99328, 25.0, 28.0),
    ("sweep d=128, no ids", 90, "replay_kernel"): Bound(255, 16, 54272),
    ("sweep d=512, no ids", 90, "sweep_kernel.walk"): Bound(216, 0, 108544, 19.5, 23.0),
    ("sweep d=512, no ids", 90, "replay_kernel"): Bound(255, 0, 108544),
    ("sweep float32", 90, "sweep_kernel.record"): Bound(184, 0, 22528, 27.5, 33.0),
    ("sweep float32", 90, "epilogue_kernel"): Bound(144, 0, 1024),
    ("split, lse", 90, "sweep_kernel.walk"): Bound(255, 48, 99328, 47.0, 57.5),
    ("split, lse", 90, "replay_kernel"): Bound(255, 80, 54272),
    ("split, lse", 90, "epilogue_kernel"): Bound(88, 0, 1024),
    ("sweep, nothing given", 90, "sweep_kernel.record"): Bound(255, 320, 99328, 26.0, 28.0),
    ("sweep, nothing given", 90, "epilogue_kernel"): Bound(144, 0, 1024),
    ("sweep, all given", 90, "sweep_kernel.record"): Bound(255, 912, 99328, 54.5, 62.5),
    ("sweep, all given", 90, "epilogue_kernel"): Bound(120, 0, 1024),
    ("sweep, all given", 90, "count_kernel"): Bound(255, 0, 90112, 31.5, 31.5),
    ("transition", 90, "sweep_kernel.record"): Bound(255, 336, 99328, 27.5, 31.0),
    ("transition", 90, "epilogue_kernel"): Bound(96, 0, 0),
    ("drawn, nothing given", 90, "gathered_kernel"): Bound(88, 0, 1024),
    ("drawn, nothing given", 90, "epilogue_kernel"): Bound(160, 0, 1024),
    ("drawn", 90, "gathered_kernel"): Bound(128, 0, 1024),
    ("drawn", 80, "gathered_kernel"): Bound(120, 0, 1024),
    ("drawn", 100, "gathered_kernel"): Bound(112, 0, 1024),
    ("given", 90, "gathered_kernel"): Bound(104, 0, 1024),
    ("lse d=128", 80, "lse_kernel"): Bound(192, 0, 73728, 17.0, 17.0),
    ("lse d=128", 80, "lse_gradient_kernel"): Bound(255, 0, 54272, 24.0, 24.0),
    ("lse d=128", 90, "lse_kernel"): Bound(216, 0, 108544, 19.0, 23.0),
    ("lse d=128", 90, "lse_gradient_kernel"): Bound(255, 0, 54272, 31.5, 32.0),
    ("lse d=128", 100, "lse_kernel"): Bound(255, 0, 81920, 13.0, 17.5),
    ("lse d=128", 100, "lse_gradient_kernel"): Bound(255, 0, 54272, 47.0, 63.0),
    ("lse d=1024", 90, "lse_kernel"): Bound(255, 0, 144384, 9.0, 9.5),
    ("lse d=1024", 90, "lse_gradient_kernel"): Bound(248, 0, 54272, 27.0, 27.0),
    ("lse float32", 90, "lse_kernel"): Bound(255, 32, 27648, 14.0, 14.0),
    ("lse float32", 90, "lse_gradient_kernel"): Bound(255, 32, 54272, 96.5, 96.5),
    ("lse, split", 90, "lse_kernel"): Bound(208, 0, 108544, 20.0, 24.0),
    ("lse, split", 90, "lse_gradient_kernel"): Bound(255, 16, 54272, 28.5, 30.0),
    ("lse, symmetric", 80, "lse_kernel"): Bound(192, 0, 73728, 17.0, 17.0),
    ("lse, symmetric", 80, "lse_gradient_kernel"): Bound(255, 0, 54272, 18.0, 18.5),
    ("lse, symmetric", 90, "lse_kernel"): Bound(216, 0, 108544, 19.0, 23.0),
    ("lse, symmetric", 90, "lse_gradient_kernel"): Bound(255, 0, 54272, 21.0, 23.0),
    ("lse, symmetric", 100, "lse_kernel"): Bound(255, 0, 81920, 13.0, 17.5),
    ("lse, symmetric", 100, "lse_gradient_kernel"): Bound(216, 0, 54272, 28.0, 37.5),
    ("lse, symmetric d=512", 90, "lse_kernel"): Bound(255, 0, 144384, 15.5, 20.5),
    ("lse, symmetric d=512", 90, "lse_gradient_kernel"): Bound(255, 0, 54272, 21.0, 23.0),
    ("loss d=128", 90, "gather_batch_kernel"): Bound(40, 0, 0),
    ("loss d=128", 90, "mean_negatives_kernel"): Bound(56, 0, 3072),
    ("loss d=128", 90, "update_stores_kernel"): Bound(32, 0, 1024),
    ("loss d=128", 90, "embedding_gradient_kernel"): Bound(64, 0, 5120),
    ("loss d=768", 90, "gather_batch_kernel"): Bound(56, 0, 3072),
    ("loss d=768", 90, "mean_negatives_kernel"): Bound(48, 0, 5120),
    ("loss d=768", 90, "update_stores_kernel"): Bound(32, 0, 1024),
    ("loss d=768", 90, "embedding_gradient_kernel"): Bound(56, 0, 1024),
    ("gumbel d=128", 80, "gumbel_kernel"): Bound(255, 0, 54272, 30.5, 31.5),
    ("gumbel d=128", 90, "gumbel_kernel"): Bound(255, 16, 90112, 33.0, 33.0),
    ("gumbel d=128", 90, "gumbel_combine_kernel"): Bound(40, 0, 2048),
    ("gumbel d=128", 100, "gumbel_kernel"): Bound(255, 112, 95232, 30.0, 30.5),
    ("gumbel d=512", 90, "gumbel_kernel"): Bound(184, 0, 108544, 35.0, 37.0),
    ("gumbel float32", 90, "gumbel_kernel"): Bound(208, 0, 22528, 32.0, 33.5),
    ("gumbel float32", 90, "gumbel_combine_kernel"): Bound(40, 0, 3072),
    ("gumbel, nothing given", 90, "gumbel_kernel"): Bound(152, 0, 90112, 38.0, 38.0),
    ("gumbel, nothing given", 90, "gumbel_combine_kernel"): Bound(40, 0, 2048),
    ("gumbel, split", 90, "gumbel_kernel"): Bound(255, 0, 90112, 33.0, 33.0),
    ("gumbel, split", 90, "gumbel_combine_kernel"): Bound(48, 0, 1024),
}

# Where Triton 3.6 needs more of anything.
BOUNDS_3_6 = {
    ("sweep d=128", 90, "sweep_kernel.walk"): Bound(255, 0, 93184, 29.5, 35.0),
    ("sweep d=128", 90, "replay_kernel"): Bound(255, 176, 54272),
    ("sweep d=128", 80, "replay_kernel"): Bound(255, 304, 54272),
    ("sweep d=128", 80, "epilogue_kernel"): Bound(136, 0, 14336),
    ("sweep d=128", 100, "sweep_kernel.walk"): Bound(255, 16, 95232, 23.0, 27.5),
    ("sweep d=128", 100, "replay_kernel"): Bound(255, 544, 54272),
    ("sweep d=128", 100, "epilogue_kernel"): Bound(136, 0, 7168),
    ("sweep d=128, no ids", 90, "sweep_kernel.walk"): Bound(255, 0, 93184, 25.0, 28.5),
    ("sweep d=128, no ids", 90, "replay_kernel"): Bound(255, 96, 54272),
    ("sweep float32", 90, "sweep_kernel.record"): Bound(184, 32, 22528, 27.0, 31.5),
    ("sweep float32", 90, "epilogue_kernel"): Bound(128, 0, 5120),
    ("split, lse", 90, "replay_kernel"): Bound(255, 128, 54272),
    ("split, lse", 90, "epilogue_kernel"): Bound(104, 0, 1024),
    ("sweep, nothing given", 90, "sweep_kernel.record"): Bound(255, 336, 93184, 26.0, 28.5),
    ("sweep, nothing given", 90, "epilogue_kernel"): Bound(136, 0, 7168),
    ("sweep, all given", 90, "epilogue_kernel"): Bound(96, 0, 14336),
    ("transition", 90, "sweep_kernel.record"): Bound(255, 336, 93184, 28.0, 31.5),
    ("transition", 90, "epilogue_kernel"): Bound(88, 0, 14336),
    ("drawn, nothing given", 90, "gathered_kernel"): Bound(104, 0, 1024),
    ("drawn, nothing given", 90, "epilogue_kernel"): Bound(128, 0, 14336),
    ("drawn", 80, "gathered_kernel"): Bound(168, 0, 1024),
    ("drawn", 100, "gathered_kernel"): Bound(128, 0, 1024),
    ("given", 90, "gathered_kernel"): Bound(136, 0, 1024),
    ("lse d=128", 80, "lse_kernel"): Bound(248, 0, 74752, 20.0, 21.0),
    ("lse d=128", 80, "lse_gradient_kernel"): Bound(255, 0, 54272, 28.5, 29.0),
    ("lse d=128", 90, "lse_kernel"): Bound(232, 0, 108544, 24.5, 34.5),
    ("lse d=128", 90, "lse_gradient_kernel"): Bound(255, 0, 54272, 33.0, 36.5),
    ("lse d=128", 100, "lse_kernel"): Bound(255, 0, 81920, 16.0, 22.5),
    ("lse d=128", 100, "lse_gradient_kernel"): Bound(255, 0, 54272, 51.0, 66.5),
    ("lse d=1024", 90, "lse_kernel"): Bound(255, 0, 144384, 12.5, 15.0),
    ("lse d=1024", 90, "lse_gradient_kernel"): Bound(255, 0, 54272, 28.5, 28.5),
    ("lse float32", 90, "lse_kernel"): Bound(255, 32, 27648, 16.5, 19.0),
    ("lse, split", 90, "lse_kernel"): Bound(232, 0, 108544, 26.0, 36.0),
    ("lse, split", 90, "lse_gradient_kernel"): Bound(255, 80, 54272, 31.5, 35.0),
    ("lse, symmetric", 80, "lse_kernel"): Bound(248, 0, 74752, 20.0, 21.0),
    ("lse, symmetric", 80, "lse_gradient_kernel"): Bound(255, 0, 54272, 20.5, 22.5),
    ("lse, symmetric", 90, "lse_kernel"): Bound(232, 0, 108544, 24.5, 34.5),
    ("lse, symmetric", 90, "lse_gradient_kernel"): Bound(255, 16, 54272, 22.5, 26.0),
    ("lse, symmetric", 100, "lse_kernel"): Bound(255, 0, 81920, 16.0, 22.5),
    ("lse, symmetric", 100, "lse_gradient_kernel"): Bound(255, 240, 54272, 29.5, 37.0),
    ("lse, symmetric d=512", 90, "lse_kernel"): Bound(255, 0, 144384, 19.5, 28.0),
    ("lse, symmetric d=512", 90, "lse_gradient_kernel"): Bound(255, 16, 54272, 22.5, 26.0),
    ("gumbel d=128", 80, "gumbel_kernel"): Bound(255, 0, 54272, 30.5, 33.5),
    ("gumbel float32", 90, "gumbel_kernel"): Bound(216, 0, 22528, 31.0, 31.0),
    ("gumbel, nothing given", 90, "gumbel_kernel"): Bound(255, 0, 90112, 36.5, 36.5),
    ("gumbel, split", 90, "gumbel_kernel"): Bound(240, 0, 90112, 33.5, 33.5),
    ("gumbel, split", 90, "gumbel_combine_kernel"): Bound(56, 0, 1024),
    ("sweep d=512", 90, "replay_kernel"): Bound(255, 32, 108544),
    ("sweep d=512, no ids", 90, "sweep_kernel.walk"): Bound(248, 0, 108544, 19.5, 22.5),
}


def bounds() -> dict[tuple[str, int, str], Bound]:
    """Those of the Triton that is here."""
    import triton

    return BOUNDS | BOUNDS_3_6 if triton.__version__.startswith("3.6.") else BOUNDS
