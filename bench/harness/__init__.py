"""What the benchmarks share: timing in turns, memory in fresh processes, the machine, results, processes with a log."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
