"""The CPU backend: torch's matrix product by tiles, and the compiled core of csrc/cpu over them."""
