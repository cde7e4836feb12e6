"""What the papers claim, measured on data that is at hand: one module a part, run.py runs them."""
