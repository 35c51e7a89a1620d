"""The text of the tasks in data/tasks is not in the corpus on which the demo model is trained."""

import json
import re
from pathlib import Path

import pytest

from apiq.calibration import demo_corpus

TASKS = Path(__file__).resolve().parents[2] / "data" / "tasks"
RUN = 12
"""Words in a row that two texts share only by copying."""


def rows(name):
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


def words(text):
    return re.findall(r"\w+", text.lower())


@pytest.fixture(scope="module")
def corpus():
    return " ".join(words(" ".join(text for split in demo_corpus.SPLITS for text in demo_corpus.documents(split))))


def test_no_sentence_is_in_the_corpus(corpus):
    for row in rows("docs_choice"):
        assert " ".join(words(f"{row['beginning']} {row['endings'][row['label']]}")) not in corpus
    for row in rows("docs_word"):
        assert " ".join(words(f"{row['phrase']} {row['word']}")) not in corpus


def test_no_run_of_words_of_the_prose_is_in_the_corpus(corpus):
    for row in rows("docs_prose"):
        page = words(row["page"])
        assert not [run for i in range(len(page) - RUN) if (run := " ".join(page[i : i + RUN])) in corpus]


def test_choices_are_four_and_different_and_the_right_one_is_anywhere():
    choices = rows("docs_choice")
    assert all(len(set(row["endings"])) == 4 for row in choices)
    places = [row["label"] for row in choices]
    assert all(places.count(place) >= len(choices) / 8 for place in range(4))
    assert len({row["beginning"] for row in choices}) == len(choices) == 60


def test_a_word_is_one_word_that_the_filters_can_find():
    phrases = rows("docs_word")
    assert all(re.fullmatch(r"\w+", row["word"]) for row in phrases)
    assert len({row["phrase"] for row in phrases}) == len(phrases) == 50
    commonest = max(sum(row["word"] == word for row in phrases) for word in {row["word"] for row in phrases})
    assert commonest <= len(phrases) / 8
