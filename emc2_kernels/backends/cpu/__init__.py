"""The CPU backend: the compiled core of csrc/cpu, given addresses."""
