"""Pairs of texts and an encoder of one table, for tests of sentence-transformers' trainer that is installed."""

import datasets
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

ITEMS, TOPICS = 64, 8


def topics():
    """Pairs of texts, an eighth of them of each topic: what has the topic's words in common is alike."""
    pairs = [[f"{side}{item} " + f"topic{item % TOPICS} " * 3 for item in range(ITEMS)] for side in "ab"]
    return datasets.Dataset.from_dict({"anchor": pairs[0], "positive": pairs[1]})


def table_model():
    """A vector for each word, and their mean."""
    names = [*(f"{side}{item}" for side in "ab" for item in range(ITEMS)), *(f"topic{each}" for each in range(TOPICS))]
    tokenizer = Tokenizer(models.WordLevel({name: place for place, name in enumerate(["?", *names])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
