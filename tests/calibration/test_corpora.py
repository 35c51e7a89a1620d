import hashlib
import json

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from apiq.calibration import hub
from apiq.calibration.corpora import load_corpus
from apiq.errors import ApiqError

ROWS = ["Once upon a time", "", " there was é\n", "a last row"]


def write(path, rows, column="text"):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, column: row}) + "\n" for i, row in enumerate(rows)))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"id": range(len(rows)), column: rows}), path)
    else:
        path.write_bytes("\n".join(rows).encode())
    return str(path)


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl", "c.parquet"])
def test_rows_are_joined_by_a_newline(tmp_path, name):
    corpus = load_corpus(write(tmp_path / name, ROWS), split="train")
    assert corpus.text == "\n".join(ROWS)
    assert corpus.sha256 == hashlib.sha256("\n".join(ROWS).encode()).hexdigest()
    assert corpus.name == corpus.origin == (tmp_path / name).as_posix()


@given(rows=st.lists(st.text(st.characters(codec="utf-8")), min_size=1), join=st.sampled_from(["\n", "\n\n", " ", ""]))
def test_any_text_comes_back_from_jsonl_and_parquet(tmp_path_factory, rows, join):
    rows = [*rows, "never empty"]
    folder = tmp_path_factory.mktemp("rows")
    for name in ("c.jsonl", "c.parquet"):
        assert load_corpus(write(folder / name, rows), split="train", join=join).text == join.join(rows)


def test_another_column(tmp_path):
    for name in ("c.jsonl", "c.parquet"):
        assert load_corpus(write(tmp_path / name, ["x y"], "story"), split="train", column="story").text == "x y"


def test_text_is_taken_as_it_is(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n")
    assert load_corpus(str(tmp_path / "c.txt"), split="train").text == "one\r\ntwo\n\n"


def test_a_folder_is_its_files_by_name_and_nothing_else(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "b.txt", ["second"])
    write(tmp_path / "a.parquet", ["first"])
    write(tmp_path / "deep" / "c.jsonl", ["third"])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache/d.txt", ["hidden"])
    write(tmp_path / ".e.txt", ["hidden"])
    assert load_corpus(str(tmp_path), split="train", join="|").text == "first|second|third"


def refused(source, **options):
    with pytest.raises(ApiqError) as refusal:
        load_corpus(str(source), split="train", **options)
    sentence = str(refusal.value)
    assert str(source).split(":")[0] in sentence and sentence.endswith(".") and "\n" not in sentence
    return sentence


def test_missing_file_says_what_there_could_be(tmp_path):
    sentence = refused(tmp_path / "none.txt")
    assert ".parquet" in sentence and "wikitext2" in sentence


@pytest.mark.parametrize("name", ["c.csv", "c"])
def test_unknown_kind(tmp_path, name):
    (tmp_path / name).write_text("text")
    assert "no known kind" in refused(tmp_path / name)


def test_folder_without_corpora(tmp_path):
    (tmp_path / "README.md").write_text("about")
    assert "holds no" in refused(tmp_path)


@pytest.mark.parametrize("content", ["", " \n \n"])
def test_empty_text(tmp_path, content):
    (tmp_path / "c.txt").write_text(content)
    assert "is empty" in refused(tmp_path / "c.txt")


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_no_rows(tmp_path, name):
    if name == "c.parquet":
        parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / name)
    else:
        write(tmp_path / name, [])
    assert "is empty" in refused(tmp_path / name)


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_missing_column_names_those_there_are(tmp_path, name):
    write(tmp_path / name, ["x"], "story")
    sentence = refused(tmp_path / name)
    assert "'text'" in sentence and "story" in sentence and "id" in sentence


def test_column_of_numbers(tmp_path):
    write(tmp_path / "c.parquet", ["x"])
    assert "int64" in refused(tmp_path / "c.parquet", column="id")
    write(tmp_path / "c.jsonl", ["x"])
    assert "line 1: 'id' is 0; it should be text" in refused(tmp_path / "c.jsonl", column="id")


@pytest.mark.parametrize(
    "bad, complaint", [("{broken", "is not JSON"), ('["text"]', "no JSON object"), ('{"text": null}', "is None")]
)
def test_bad_line_by_its_number(tmp_path, bad, complaint):
    (tmp_path / "c.jsonl").write_text('{"text": "fine"}\n\n' + bad + "\n")
    sentence = refused(tmp_path / "c.jsonl")
    assert "line 3" in sentence and complaint in sentence


def test_null_row_by_its_number(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "c.parquet")
    assert "row 2 has no text" in refused(tmp_path / "c.parquet")


def test_not_utf8_by_its_line(tmp_path):
    (tmp_path / "c.txt").write_bytes("one\ntwo\ncaf\u00e9".encode("latin-1"))
    sentence = refused(tmp_path / "c.txt")
    assert "line 3" in sentence and "0xe9" in sentence


def test_half_a_surrogate_pair(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "smile \\ud83d"}')
    assert "line 1: 'text' holds half of a surrogate pair" in refused(tmp_path / "c.jsonl")


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", lambda content: b"no parquet"])
def test_damaged_parquet(tmp_path, damage):
    path = tmp_path / "c.parquet"
    write(path, ROWS * 50)
    path.write_bytes(damage(path.read_bytes()))
    assert "is damaged" in refused(path)


@pytest.fixture
def on_the_hub(monkeypatch):
    """`load_dataset` as it would be with a hub: what it is asked for is noted down, what it gives are local rows."""
    asked = []

    def load_dataset(repository, configuration, **options):
        asked.append((repository, configuration, options["split"], options["data_files"]))
        column = "sentence" if "ptb" in repository else "text"
        return datasets.Dataset.from_dict({column: [f"{options['split']} 1", "2"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    "source, split, repository, part",
    [
        ("wikitext2", "test", "Salesforce/wikitext", "test"),
        ("wikitext2:validation", "test", "Salesforce/wikitext", "validation"),
        ("c4", "train", "allenai/c4", "train[:45576]"),
        ("c4", "test", "allenai/c4", "validation[:45576]"),
        ("ptb", "train", "ptb-text-only/ptb_text_only", "train"),
        ("pile", "train", "mit-han-lab/pile-val-backup", "validation[:16384]"),
    ],
)
def test_names_on_the_hub(on_the_hub, source, split, repository, part):
    corpus = load_corpus(source, split=split, join=" ")
    assert corpus.text == f"{part} 1 2"
    assert corpus.origin.startswith(repository) and corpus.origin.endswith(part)
    assert on_the_hub[0][0] == repository and on_the_hub[0][2] == part


def test_c4_reads_one_file(on_the_hub):
    load_corpus("c4:validation", split="train")
    assert on_the_hub[0][3] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}


def test_a_split_that_is_not_there(on_the_hub):
    assert "no split 'test'; it has train, validation" in refused("c4:test")
    assert not on_the_hub


@pytest.mark.parametrize("name", sorted(hub.CORPORA))
def test_without_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    assert "cannot be had from the Hugging Face hub" in refused(name)


def of_kind(path, values):
    parquet.write_table(pyarrow.table({"text": values}), path)
    return path


@pytest.mark.parametrize("kind", [pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_text_is_text_however_parquet_keeps_it(tmp_path, kind):
    path = of_kind(tmp_path / "c.parquet", pyarrow.array(["one", "two", "one"], type=kind))
    assert load_corpus(str(path), split="train", join="|").text == "one|two|one"
    of_kind(path, pyarrow.array(["one", None], type=kind))
    assert "row 2 has no text" in refused(path)


def test_a_dictionary_of_numbers_is_no_text(tmp_path):
    assert "should hold text" in refused(of_kind(tmp_path / "c.parquet", pyarrow.array([1, 2]).dictionary_encode()))


def test_parquet_whose_text_is_not_utf8(tmp_path):
    offsets, data = pyarrow.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0])), pyarrow.py_buffer(b"\xff\xfe")
    path = of_kind(tmp_path / "c.parquet", pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, data]))
    assert "bytes that are not UTF-8" in refused(path)


def test_two_columns_of_one_name(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(table, tmp_path / "c.parquet")
    assert "several columns 'text'" in refused(tmp_path / "c.parquet")


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000])
def test_json_that_python_does_not_read(tmp_path, value):
    (tmp_path / "c.jsonl").write_text(f'{{"text": "a"}}\n{{"text": "b", "n": {value}}}')
    assert "line 2 cannot be read" in refused(tmp_path / "c.jsonl")
