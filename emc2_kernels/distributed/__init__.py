"""Batches and stores over the ranks of a process group, by torch.distributed."""
