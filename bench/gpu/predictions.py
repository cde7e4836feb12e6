"""What was predicted for an H100 before any of it was measured, to be read beside what is.

The predictions are for one NVIDIA H100 (132 multiprocessors, 1.7 GHz, L2 5.5 TB/s, memory 3.0 TB/s, bf16 products at
780 TFLOP/s), and come from the compiled code and the bytes that it moves. Where a kernel changes, so does what is
predicted of it (docs/development/gpu-log.md has both). A prediction that turns out wrong stays as it is: that it was
wrong is the result.
"""

CARD = "H100"

# Row -> quantity, or "quantity [backend]" where it is of one backend alone -> (low, high), in the quantity's unit.
PREDICTED: dict[str, dict[str, tuple[float, float]]] = {
    # Triton: 1.25 to 1.6 times 0.67 and 0.85 ms, of 18.0 and 22.7 cycles for 32 pairs; 0.78 ms of loads go on beside
    # them. The cuda backend's matrix_sweep.cuh: 15.8 instructions a pair for the walk, 1.0 for the scale and 0.85 for
    # each 64 dimensions are 0.69 ms of the schedulers at d = 128; at d = 512 the product alone takes 1.41.
    "sweep-128": {"time, ms": (0.85, 1.1), "time, ms [cuda]": (0.75, 0.95), "torch.mm, ms": (0.75, 0.85)},
    "sweep-ids-128": {"time, ms": (1.05, 1.3), "time, ms [cuda]": (0.78, 1.0), "torch.mm, ms": (0.75, 0.85)},
    # Triton: the loads of a tile and its walk one after the other, 1.4 to 3.1 ms, and 0.6, with ids 0.85.
    "sweep-512": {"time, ms": (2.0, 3.9), "time, ms [cuda]": (1.5, 1.8), "torch.mm, ms": (1.45, 1.45)},
    "sweep-ids-512": {"time, ms": (2.2, 4.1), "time, ms [cuda]": (1.5, 1.85), "torch.mm, ms": (1.45, 1.45)},
    "uniform": {"time, ms [cuda]": (0.95, 1.15), "index_select, ms": (1.6, 1.9)},
    "small-64": {"replay, us [cuda]": (4, 6), "replay, us [triton]": (10, 14)},
    "loss-32": {"eager, us": (180, 280), "replay, us": (25, 40)},
    "loss-16384": {"time, ms": (3.6, 4.5)},
    "lse-128": {"time, ms": (0.9, 1.1)},
    "lse-backward-128": {"one of two kernels, ms": (1.0, 1.4)},
    "lse-backward-512": {"one of two kernels, ms": (4.5, 6)},
    "isir-128": {"time, ms": (1.35, 1.7)},
    # The host's part was counted at 187 us without a driver; as many launches as "loss-32", two of one program each.
    "isir-loss-32": {"eager, us": (190, 290), "replay, us": (25, 45)},
}


def find_prediction(row: str, quantity: str, backend: str, device: str) -> dict[str, object] | None:
    """The range, and whether this is the card that it is for."""
    of_row = PREDICTED.get(row, {})
    found = of_row.get(f"{quantity} [{backend}]", of_row.get(quantity))
    return found and {"low": found[0], "high": found[1], "for": CARD, "for_this_card": CARD in device}
