"""The Triton backend: all chains at once, on GPUs (on CPU tensors in the interpreter: TRITON_INTERPRET=1)."""
