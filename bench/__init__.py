"""Benchmarks. Each is run from the checkout's root, `python -m bench.throughput`, and says with `--help` what it takes.

    throughput      time and memory of one sampling step beside its peers (peers.py)
    compare         what has become slower from one results file of throughput to another
    side_by_side    results files of throughput as a table in Markdown, a column a file
    losses          every loss, forward and backward, beside plain torch
    gumbel          exact draws from the softmax beside the naive ways
    end_to_end      whole training steps, and what part of them is the loss
    gcbs            what choosing batches costs
    scaling         bytes and modelled time of a step over many GPUs
    gpu.check       on a GPU: is it right, and how fast (make gpu-check); its parts are in gpu/
    gpu_peers       on a GPU: the losses over a whole batch beside public kernels; the goals
    gpu.host        what small batches cost the host, measured without a GPU
    gpu.compiled    what the Triton kernels compile to, for GPUs that need not be here

harness/ is what they share; results/ is what they measured, by machine.
"""
