"""What the papers claim, measured on data that is at hand: one module a part, `python -m examples.study` runs them.

By themselves run `gradient_bias.py` (at fixed parameters), `global_loss.py` (in training) and `compare_methods.py`
(accuracy of all methods).
"""
