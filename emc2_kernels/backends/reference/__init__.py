"""The reference backend: the formulas in plain torch, float64 too, and the oracle of every kernel."""
