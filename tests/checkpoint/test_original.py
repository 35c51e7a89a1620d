import shutil

import pytest

from apiq.checkpoint.original import content


def test_notes_beside_a_model_do_not_make_it_another(original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "model")
    before = content(folder)
    for name in ("notes.txt", "results.json", "LICENSE.txt", "model.json", "README.md"):
        (folder / name).write_text("{}")
    assert content(folder) == before
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= before.keys()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "extra.safetensors", "chat_template.jinja"])
def test_what_transformers_computes_with_does(original, tmp_path, name):
    folder = shutil.copytree(original, tmp_path / "model")
    before = content(folder)
    (folder / name).write_text("other")
    assert content(folder) != before
