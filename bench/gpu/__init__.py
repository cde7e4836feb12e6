"""For a GPU: is it right, and how fast. `python -m bench.gpu.check` runs all of it, in stages (stages.py).

smoke           every family of kernels (families.py, loss_trials.py) against float64 (oracle.py)
benchmark       rows (rows.py) beside the machine's limits (limits.py) and what was predicted (predictions.py)
tune            other sizes for the Triton kernels (candidates.py)
compiled        what they compile to, and the execution pipe that binds (sass.py)
"""
