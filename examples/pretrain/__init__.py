"""Contrastive pre-training of an image encoder: `python -m examples.pretrain --help`.

`training.py` is a run from start to end, `run.py` its steps and what a checkpoint holds, `config.py` its settings;
`data.py` says where images come from, `augment.py` what a view of one is, and `evaluate.py` what features are worth.
"""
