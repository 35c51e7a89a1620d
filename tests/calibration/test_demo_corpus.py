import ast
import hashlib
import sys
from pathlib import Path

import pytest

from apiq.calibration import demo_corpus
from apiq.calibration.corpora import load_corpus
from apiq.errors import ApiqError


def paragraphs(split):
    """Paragraphs of a split, whitespace aside, that are long enough to be unlike others by chance."""
    texts = (" ".join(part.split()) for text in demo_corpus.documents(split) for part in text.split("\n\n"))
    return [text for text in texts if len(text) >= demo_corpus.SHORTEST]


def test_no_paragraph_occurs_twice_within_or_between_splits():
    every = [text for split in demo_corpus.SPLITS for text in paragraphs(split)]
    assert len(every) == len(set(every)) > 5_000


def test_size_and_shares_of_the_splits():
    sizes = {split: sum(map(len, demo_corpus.documents(split))) for split in demo_corpus.SPLITS}
    assert sum(sizes.values()) > 1_500_000
    assert 0.85 < sizes["train"] / sum(sizes.values()) < 0.95
    assert min(sizes["validation"], sizes["test"]) > 50_000


def test_the_text_alone_decides_split_and_order():
    """So the corpus of another Python never moves a text from train to test."""
    bounds = {"test": (0, 0.05), "validation": (0.05, 0.1), "train": (0.1, 1)}
    for split, (least, most) in bounds.items():
        hashes = [hashlib.sha256(text.encode()).digest() for text in demo_corpus.documents(split)]
        assert hashes == sorted(set(hashes))
        assert all(least <= each[0] / 256 < most for each in hashes)


def test_it_holds_the_language_reference_and_docstrings():
    text = "\n".join(text for split in demo_corpus.SPLITS for text in demo_corpus.documents(split))
    assert 'The "with" statement' in text
    source = (Path(ast.__file__).parent / "json" / "__init__.py").read_bytes()
    assert ast.get_docstring(ast.parse(source)).split("\n\n")[0] in text


def test_reading_imports_nothing_of_what_it_reads():
    demo_corpus.documents("train")
    assert not {"turtle", "this", "antigravity", "pydoc_data"} & set(sys.modules)


def test_each_document_ends_in_one_newline():
    assert all(text.endswith("\n") and not text.endswith("\n\n") for text in demo_corpus.documents("train"))


def test_as_a_corpus():
    corpus = load_corpus("demo:validation", split="train")
    assert corpus.text == "\n".join(demo_corpus.documents("validation"))
    assert load_corpus("demo", split="test").origin.endswith("test")


def test_unknown_split():
    with pytest.raises(ApiqError, match="no split 'dev'; it has train, validation, test"):
        load_corpus("demo:dev", split="train")


def test_a_python_without_its_sources(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ApiqError, match="needs the source files"):
        demo_corpus._splits.__wrapped__()


def test_broken_and_optional_files_are_passed_over(monkeypatch, tmp_path):
    def put(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    put("pydoc_data/topics.py", "topics = {'b': 'The second topic, which is long enough to stay.', 'a': 'short'}\n")
    put("broken.py", '"""A docstring of a module that does not parse, so nobody can read it."""\ndef f(:\n')
    put("test/t.py", '"""A docstring of the test package, which distributions leave out."""\n')
    put("site-packages/p.py", '"""A docstring of an installed package, which others do not have."""\n')
    put(
        "m.py",
        'class A:\n    if 1:\n        def f():\n            """A docstring of a method below an if statement."""\n',
    )
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    found = [text for split in demo_corpus._splits.__wrapped__().values() for text in split]
    assert sorted(found) == [
        "A docstring of a method below an if statement.\n",
        "The second topic, which is long enough to stay.\n",
    ]
