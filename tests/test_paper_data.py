"""The loaders of ``make paper`` on small files in the published formats, and its own data."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch

from paper.data import clicks, grammar, parallel, sentences, text
from paper.data.files import DataError


def write(path: Path, *lines: str) -> None:
    """A text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- running text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "files"), [("ptb", text.PTB), ("wikitext", text.WIKITEXT)])
def test_words_become_numbers_of_the_training_vocabulary(tmp_path, kind, files):
    write(tmp_path / files["train"], " the cat <unk> the ", "", " = a = ")
    write(tmp_path / files["validation"], "the dog")
    write(tmp_path / files["test"], "cat")
    corpus = text.read(tmp_path, kind)
    assert corpus.words[:2] == ["<unk>", "<eos>"]
    back = [corpus.words[i] for i in corpus.train]
    assert back == ["the", "cat", "<unk>", "the", "<eos>", "=", "a", "=", "<eos>"]
    assert [corpus.words[i] for i in corpus.validation] == ["the", "<unk>", "<eos>"]


def test_missing_text_names_the_file_and_the_option(tmp_path):
    with pytest.raises(DataError, match=r"has no ptb.train.txt; pass the folder that has it as --root"):
        text.read(tmp_path, "ptb")
    with pytest.raises(DataError, match=r"pass the folder with ptb.train.txt as --root"):
        text.read(None, "ptb")


def test_text_that_ships_with_python():
    corpus = text.python_topics()
    assert min(map(len, (corpus.train, corpus.validation, corpus.test))) > 1000
    assert {"the", "object", "("} <= set(corpus.words)
    assert (corpus.test == 0).float().mean() < 0.2  # unknown words


def test_bytes_that_ship_with_python():
    corpus = text.python_library()
    assert len(corpus.train) > 1_000_000
    assert min(map(len, (corpus.validation, corpus.test))) > 10_000
    assert "".join(corpus.words[i] for i in corpus.train[:3]) == '"""'


# ---- parallel text ---------------------------------------------------------------------------------------------------


def iwslt(root: Path) -> None:
    """Three parts of two languages; the validation part is called dev."""
    for part, n in (("train", 4), ("dev", 1), ("test", 2)):
        write(root / f"{part}.de", *["das hau@@ s"] * n)
        write(root / f"{part}.en", *["the house"] * n)


def test_parallel_files(tmp_path):
    iwslt(tmp_path)
    data = parallel.read(tmp_path)
    source, target = data.tokens["train"]
    assert source.shape == (4, 5)
    assert target.shape == (4, 4)
    assert source[0, 0] == parallel.START
    assert source[0, -1] == parallel.END
    assert data.source.decode(source[0]) == "das hau@@ s"
    assert data.target.decode(target[0]) == "the house"
    assert data.references["test"] == ["the house"] * 2


def test_parallel_files_of_different_lengths(tmp_path):
    iwslt(tmp_path)
    write(tmp_path / "test.en", "one")
    with pytest.raises(DataError, match=r"test.de has 2 lines, .*test.en has 1"):
        parallel.read(tmp_path)


def test_sentences_of_the_grammar_agree():
    """Articles, endings and the participle's place follow from what is written down in the tables alone."""
    german = {}
    for english, words in (grammar.sentence(random.Random(seed)) for seed in range(2000)):
        german[" ".join(english)] = words
    masculine = {noun[2] for noun in grammar.NOUNS if noun[4] == "m"} - {noun[3] for noun in grammar.NOUNS}
    for english, words in german.items():
        for before, word in itertools.pairwise(words):
            assert not (before in ("die", "das", "eine", "einer") and word in masculine), words
        if english.startswith("i know that"):
            assert words[-1] in {verb[i] for verb in grammar.VERBS for i in (3, 4)} | {"hat", "haben"}
        elif "has" in english.split():
            assert "hat" in words
            assert words[-1] in {verb[5] for verb in grammar.VERBS}


def test_numbers_are_said_the_other_way_round():
    english, german = next(p for p in (grammar.number(random.Random(i)) for i in range(99)) if len(p[0]) == 2)
    units, tens = dict(grammar.UNITS), dict(grammar.TENS)
    assert german == [units[english[1]], "und", tens[english[0]]]


def test_no_sentence_is_in_two_parts():
    data = parallel.from_grammar(n_train=300, n_held=100)
    parts = [{tuple(row.tolist()) for row in data.tokens[part][0]} for part in ("validation", "test")]
    assert [len(part) for part in parts] == [100, 100]
    train = {tuple(row[row > 0].tolist()) for row in data.tokens["train"][0]}
    assert len(train) == 300
    assert not any(tuple(i for i in row if i) in train for part in parts for row in part)


# ---- sentences to classify -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sentences.RULES)
def test_rules_give_both_classes_and_parts_without_common_sentences(name):
    parts = sentences.by_rule(name, {"test": 100, "train": 200})
    both = [{" ".join(words) for words, _ in parts[part]} for part in ("test", "train")]
    assert [len(part) for part in both] == [100, 200]
    assert not both[0] & both[1]
    assert 60 < sum(label for _, label in parts["train"]) < 140


# ---- click logs ------------------------------------------------------------------------------------------------------


def criteo(click: str, number: str, category: str) -> str:
    """A row; the last number and category are empty."""
    return "\t".join([click, *[number] * 12, "", *[category] * 25, ""])


def test_criteo(tmp_path):
    write(tmp_path / "train.txt", criteo("1", "3", "0000000a"), criteo("0", "-2", "ffffffff"))
    found = clicks.read_criteo(tmp_path, n_categories=101)
    assert found.clicked.tolist() == [1, 0]
    assert found.dense.shape == (2, 13)
    assert found.dense[0, 0].item() == pytest.approx(math.log(4))
    assert found.dense[1, 0] == 0
    assert found.dense[0, 12] == 0
    assert found.sparse.shape == (2, 26, 1)
    assert found.sparse[:, 0, 0].tolist() == [11, 0xFFFFFFFF % 100 + 1]
    assert found.sparse[0, 25, 0] == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [("1\t2", "2 fields; expected 40"), (criteo("2", "3", "a"), "'2'"), (criteo("1", "x", "a"), "'x'")],
)
def test_criteo_with_a_bad_row(tmp_path, row, message):
    write(tmp_path / "train.txt", criteo("1", "3", "a"), row)
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        clicks.read_criteo(tmp_path, n_categories=101)


def test_generated_clicks_are_planted_and_repeatable():
    logs = clicks.generate(4000)
    again = clicks.generate(4000)
    assert all(torch.equal(getattr(logs, name), getattr(again, name)) for name in ("dense", "sparse", "clicked"))
    assert 0.2 < logs.clicked.mean() < 0.6
    assert all(0 < column.max() <= size for column, size in zip(logs.sparse.unbind(1), clicks.SIZES, strict=True))
    assert (logs.sparse[:, :, 0] > 0).all()
    assert (logs.sparse[:, -1, 1:] == 0).any()  # bags of different lengths
    # The numbers alone predict clicks better than their mean does.
    weights = torch.linalg.lstsq(logs.dense, (logs.clicked - logs.clicked.mean())[:, None]).solution
    assert torch.corrcoef(torch.stack([(logs.dense @ weights)[:, 0], logs.clicked]))[0, 1] > 0.1
    parts = clicks.in_order(logs, 500)
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [3000, 500, 500]
