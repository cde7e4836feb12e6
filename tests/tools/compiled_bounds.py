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
    ("sweep d=128", 90, "sweep_kernel.walk"): Bound(255, 0, 99328, 23.0, 23.5),
    ("sweep d=128", 90, "replay_kernel"): Bound(255, 48, 54272),
    ("sweep d=128", 80, "sweep_kernel.walk"): Bound(255, 64, 54272, 22.0, 23.0),
    ("sweep d=128", 80, "replay_kernel"): Bound(255, 32, 54272),
    ("sweep d=128", 80, "epilogue_kernel"): Bound(160, 0, 1024),
    ("sweep d=128", 100, "sweep_kernel.walk"): Bound(255, 80, 95232, 21.0, 23.5),
    ("sweep d=128", 100, "replay_kernel"): Bound(255, 128, 54272),
    ("sweep d=128", 100, "epilogue_kernel"): Bound(160, 0, 1024),
    ("sweep d=512", 90, "sweep_kernel.walk"): Bound(255, 0, 108544, 20.5, 23.5),
    ("sweep d=512", 90, "replay_kernel"): Bound(255, 48, 108544),
    ("sweep d=128, no ids", 90, "sweep_kernel.walk"): Bound(255, 0, 99328, 18.5, 18.5),
    ("sweep d=128, no ids", 90, "replay_kernel"): Bound(255, 16, 54272),
    ("sweep d=512, no ids", 90, "sweep_kernel.walk"): Bound(255, 0, 108544, 16.5, 17.0),
    ("sweep d=512, no ids", 90, "replay_kernel"): Bound(255, 0, 108544),
    ("sweep float32", 90, "sweep_kernel.record"): Bound(184, 32, 22528, 26.0, 30.5),
    ("sweep float32", 90, "epilogue_kernel"): Bound(144, 0, 1024),
    ("split, lse", 90, "sweep_kernel.walk"): Bound(255, 48, 99328, 29.5, 29.5),
    ("split, lse", 90, "replay_kernel"): Bound(255, 80, 54272),
    ("split, lse", 90, "epilogue_kernel"): Bound(88, 0, 1024),
    ("sweep, nothing given", 90, "sweep_kernel.record"): Bound(255, 304, 99328, 26.0, 26.0),
    ("sweep, nothing given", 90, "epilogue_kernel"): Bound(144, 0, 1024),
    ("sweep, all given", 90, "sweep_kernel.record"): Bound(255, 704, 99328, 46.5, 47.5),
    ("sweep, all given", 90, "epilogue_kernel"): Bound(120, 0, 1024),
    ("sweep, all given", 90, "count_kernel"): Bound(255, 0, 90112, 25.0, 25.0),
    ("transition", 90, "sweep_kernel.record"): Bound(255, 416, 99328, 28.0, 28.5),
    ("transition", 90, "epilogue_kernel"): Bound(96, 0, 0),
    ("drawn, nothing given", 90, "gathered_kernel"): Bound(88, 0, 1024),
    ("drawn, nothing given", 90, "epilogue_kernel"): Bound(160, 0, 1024),
    ("drawn", 90, "gathered_kernel"): Bound(128, 0, 1024),
    ("drawn", 80, "gathered_kernel"): Bound(120, 0, 1024),
    ("drawn", 100, "gathered_kernel"): Bound(112, 0, 1024),
    ("given", 90, "gathered_kernel"): Bound(104, 0, 1024),
    ("lse d=128", 80, "lse_kernel"): Bound(184, 0, 73728, 16.5, 16.5),
    ("lse d=128", 80, "lse_gradient_kernel"): Bound(224, 0, 54272, 23.5, 23.5),
    ("lse d=128", 90, "lse_kernel"): Bound(255, 0, 108544, 16.5, 16.5),
    ("lse d=128", 90, "lse_gradient_kernel"): Bound(255, 0, 92160, 16.0, 16.0),
    ("lse d=128", 100, "lse_kernel"): Bound(255, 0, 81920, 11.5, 13.5),
    ("lse d=128", 100, "lse_gradient_kernel"): Bound(255, 0, 54272, 30.0, 30.0),
    ("lse d=256", 90, "lse_gradient_kernel"): Bound(255, 0, 90112, 31.5, 31.5),
    ("lse d=512", 90, "lse_gradient_kernel"): Bound(255, 96, 232448, 42.5, 42.5),
    ("lse d=256", 90, "lse_kernel"): Bound(255, 0, 144384, 13.5, 14.0),
    ("lse d=512", 90, "lse_kernel"): Bound(255, 0, 144384, 13.5, 14.0),
    ("lse d=1024", 90, "lse_kernel"): Bound(248, 0, 144384, 7.5, 8.5),
    ("lse d=1024", 90, "lse_gradient_kernel"): Bound(255, 0, 108544, 33.0, 33.0),
    ("lse float32", 90, "lse_kernel"): Bound(255, 0, 27648, 14.0, 14.0),
    ("lse float32", 90, "lse_gradient_kernel"): Bound(184, 0, 54272, 95.5, 95.5),
    ("lse, split", 90, "lse_kernel"): Bound(255, 0, 108544, 17.0, 17.0),
    ("lse, split", 90, "lse_gradient_kernel"): Bound(255, 0, 92160, 17.0, 17.0),
    ("lse, symmetric", 80, "lse_kernel"): Bound(184, 0, 73728, 16.5, 16.5),
    ("lse, symmetric", 80, "lse_gradient_kernel"): Bound(232, 0, 54272, 15.0, 15.0),
    ("lse, symmetric", 90, "lse_kernel"): Bound(255, 0, 108544, 16.5, 16.5),
    ("lse, symmetric", 90, "lse_gradient_kernel"): Bound(255, 144, 92160, 12.0, 12.0),
    ("lse, symmetric", 100, "lse_kernel"): Bound(255, 0, 81920, 11.5, 13.5),
    ("lse, symmetric", 100, "lse_gradient_kernel"): Bound(255, 32, 54272, 19.0, 19.0),
    ("lse, symmetric d=512", 90, "lse_kernel"): Bound(255, 0, 144384, 13.5, 14.0),
    ("lse, symmetric d=512", 90, "lse_gradient_kernel"): Bound(255, 48, 232448, 25.0, 25.0),
    ("loss d=128", 90, "gather_batch_kernel"): Bound(40, 0, 0),
    ("loss d=128", 90, "mean_negatives_kernel"): Bound(56, 0, 3072),
    ("loss d=128", 90, "update_stores_kernel"): Bound(32, 0, 1024),
    ("loss d=128", 90, "embedding_gradient_kernel"): Bound(64, 0, 5120),
    ("loss d=768", 90, "gather_batch_kernel"): Bound(56, 0, 3072),
    ("loss d=768", 90, "mean_negatives_kernel"): Bound(48, 0, 5120),
    ("loss d=768", 90, "update_stores_kernel"): Bound(32, 0, 1024),
    ("loss d=768", 90, "embedding_gradient_kernel"): Bound(56, 0, 1024),
    ("gumbel d=128", 80, "gumbel_kernel"): Bound(255, 0, 54272, 26.5, 30.0),
    ("gumbel d=128", 90, "gumbel_kernel"): Bound(224, 0, 90112, 28.0, 28.0),
    ("gumbel d=128", 90, "gumbel_combine_kernel"): Bound(40, 0, 2048),
    ("gumbel d=128", 100, "gumbel_kernel"): Bound(255, 32, 95232, 25.5, 25.5),
    ("gumbel d=512", 90, "gumbel_kernel"): Bound(192, 0, 108544, 31.5, 31.5),
    ("gumbel float32", 90, "gumbel_kernel"): Bound(184, 0, 22528, 27.5, 27.5),
    ("gumbel float32", 90, "gumbel_combine_kernel"): Bound(40, 0, 3072),
    ("gumbel, nothing given", 90, "gumbel_kernel"): Bound(136, 0, 90112, 30.0, 30.0),
    ("gumbel, nothing given", 90, "gumbel_combine_kernel"): Bound(40, 0, 2048),
    ("gumbel, split", 90, "gumbel_kernel"): Bound(248, 0, 90112, 28.0, 28.0),
    ("gumbel, split", 90, "gumbel_combine_kernel"): Bound(48, 0, 1024),
    ("isir d=128", 80, "isir_kernel"): Bound(255, 0, 54272, 38.5, 38.5),
    ("isir d=128", 80, "isir_combine_kernel"): Bound(56, 0, 2048),
    ("isir d=128", 90, "isir_kernel"): Bound(255, 0, 90112, 42.0, 42.0),
    ("isir d=128", 100, "isir_kernel"): Bound(255, 32, 95232, 37.0, 37.0),
    ("isir d=128", 100, "isir_combine_kernel"): Bound(56, 0, 3072),
    ("isir d=512", 90, "isir_kernel"): Bound(255, 0, 108544, 41.0, 41.0),
    ("isir d=128, no ids", 90, "isir_kernel"): Bound(184, 0, 90112, 34.5, 34.5),
    ("isir float32", 90, "isir_kernel"): Bound(184, 0, 22528, 40.5, 40.5),
    ("isir float32", 90, "isir_combine_kernel"): Bound(96, 0, 5120),
    ("isir, split", 90, "isir_kernel"): Bound(255, 16, 90112, 43.5, 43.5),
    ("isir, split", 90, "isir_combine_kernel"): Bound(40, 0, 1024),
}

# Where Triton 3.6 needs more of anything.
BOUNDS_3_6 = {
    ("sweep d=128", 90, "replay_kernel"): Bound(255, 160, 54272),
    ("sweep d=128", 80, "replay_kernel"): Bound(255, 384, 54272),
    ("sweep d=128", 80, "epilogue_kernel"): Bound(136, 0, 14336),
    ("sweep d=128", 100, "replay_kernel"): Bound(255, 608, 54272),
    ("sweep d=128", 100, "epilogue_kernel"): Bound(136, 0, 7168),
    ("sweep d=128, no ids", 90, "replay_kernel"): Bound(255, 96, 54272),
    ("sweep float32", 90, "epilogue_kernel"): Bound(128, 0, 5120),
    ("split, lse", 90, "replay_kernel"): Bound(255, 112, 54272),
    ("split, lse", 90, "epilogue_kernel"): Bound(104, 0, 1024),
    ("sweep, nothing given", 90, "sweep_kernel.record"): Bound(255, 336, 93184, 26.0, 26.5),
    ("sweep, nothing given", 90, "epilogue_kernel"): Bound(136, 0, 7168),
    ("sweep, all given", 90, "epilogue_kernel"): Bound(96, 0, 14336),
    ("transition", 90, "sweep_kernel.record"): Bound(255, 336, 93184, 28.0, 29.0),
    ("transition", 90, "epilogue_kernel"): Bound(88, 0, 14336),
    ("drawn, nothing given", 90, "gathered_kernel"): Bound(104, 0, 1024),
    ("drawn, nothing given", 90, "epilogue_kernel"): Bound(128, 0, 14336),
    ("drawn", 80, "gathered_kernel"): Bound(168, 0, 1024),
    ("drawn", 100, "gathered_kernel"): Bound(128, 0, 1024),
    ("given", 90, "gathered_kernel"): Bound(136, 0, 1024),
    ("lse d=128", 80, "lse_kernel"): Bound(232, 0, 74752, 16.0, 16.0),
    ("lse d=128", 80, "lse_gradient_kernel"): Bound(232, 0, 54272, 24.0, 24.0),
    ("lse d=128", 100, "lse_kernel"): Bound(255, 0, 81920, 16.0, 19.0),
    ("lse d=128", 100, "lse_gradient_kernel"): Bound(255, 0, 54272, 35.0, 35.0),
    ("lse d=1024", 90, "lse_gradient_kernel"): Bound(255, 0, 108544, 33.5, 33.5),
    ("lse float32", 90, "lse_kernel"): Bound(255, 32, 27648, 14.0, 14.0),
    ("lse, split", 90, "lse_kernel"): Bound(255, 16, 108544, 17.0, 17.0),
    ("lse, symmetric", 80, "lse_kernel"): Bound(232, 0, 74752, 16.0, 16.0),
    ("lse, symmetric", 80, "lse_gradient_kernel"): Bound(240, 0, 54272, 15.5, 15.5),
    ("lse, symmetric", 100, "lse_kernel"): Bound(255, 0, 81920, 16.0, 19.0),
    ("lse, symmetric", 100, "lse_gradient_kernel"): Bound(255, 0, 54272, 24.5, 24.5),
    ("lse d=256", 90, "lse_gradient_kernel"): Bound(255, 32, 90112, 32.5, 32.5),
    ("gumbel, nothing given", 90, "gumbel_kernel"): Bound(184, 0, 90112, 29.5, 29.5),
    ("gumbel, split", 90, "gumbel_combine_kernel"): Bound(56, 0, 1024),
    ("gumbel d=128", 90, "gumbel_kernel"): Bound(255, 0, 90112, 28.0, 28.0),
    ("gumbel d=128", 100, "gumbel_kernel"): Bound(255, 0, 95232, 26.0, 26.0),
    ("gumbel d=512", 90, "gumbel_kernel"): Bound(200, 0, 108544, 31.5, 31.5),
    ("isir d=128", 80, "isir_kernel"): Bound(255, 0, 54272, 39.0, 39.0),
    ("isir d=128", 100, "isir_kernel"): Bound(255, 0, 95232, 37.5, 37.5),
    ("isir d=128", 100, "isir_combine_kernel"): Bound(64, 0, 3072),
    ("isir d=128, no ids", 90, "isir_kernel"): Bound(255, 0, 90112, 34.0, 34.0),
    ("isir float32", 90, "isir_kernel"): Bound(184, 0, 22528, 41.0, 41.0),
    ("isir, split", 90, "isir_combine_kernel"): Bound(48, 0, 1024),
    ("sweep, all given", 90, "sweep_kernel.record"): Bound(255, 752, 99328, 43.5, 43.5),
    ("sweep, all given", 90, "count_kernel"): Bound(255, 0, 90112, 26.0, 26.0),
    ("sweep d=128", 80, "sweep_kernel.walk"): Bound(255, 96, 54272, 22.0, 24.0),
}


def bounds() -> dict[tuple[str, int, str], Bound]:
    """Those of the Triton that is here."""
    import triton

    return BOUNDS | BOUNDS_3_6 if triton.__version__.startswith("3.6.") else BOUNDS
