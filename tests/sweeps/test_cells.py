"""From a file to cells: all combinations, validated, named for what they are."""

import re
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apiq.errors import ApiqError
from apiq.overrides import read_yaml
from apiq.sweeps.cells import Local, plan, slug

ROOT = Path(__file__).parents[2]


def test_each_combination_is_a_cell_with_what_all_share(write):
    found = plan(write()).cells
    assert [tuple(cell.labels.values()) for cell in found] == list(product(["3", "2"], ["rtn", "bw"]))
    assert found[3].changes == {"quantize.bits": 2, "quantize.method": "apiq-bw", "quantize.rank": 4}
    assert found[3].settings == {"refine.epochs": 0, "finetune.task": "none", "evaluate.tasks": [], **found[3].changes}


def test_names_are_readable_and_follow_all_that_decides_a_result(write, place):
    names = [cell.name for cell in plan(write()).cells]
    assert names == [cell.name for cell in plan(write()).cells]
    assert re.fullmatch(r"small-3-rtn-[0-9a-f]{8}", names[0])
    seen = set(names)
    for other in (
        plan(write(), settings=["quantize.seed=1"]),
        plan(write(), threads=2),
        plan(write((place / write()).read_text().replace("tasks: []", "tasks: [], calibration.seed: 3"))),
    ):
        assert not seen & {cell.name for cell in other.cells}
        seen |= {cell.name for cell in other.cells}
    (place / "params.yaml").write_text((place / "params.yaml").read_text().replace("windows: 128", "windows: 64"))
    assert not seen & {cell.name for cell in plan(write()).cells}


@given(st.lists(st.text(), min_size=1))
def test_a_slug_is_a_name_for_git_and_files(words):
    assert re.fullmatch(r"([a-z0-9]+(-[a-z0-9]+)*)?", slug(*words))


def test_a_cell_that_cannot_be_run_is_refused_before_anything_runs(write, place):
    text = (place / write()).read_text().replace("[3, 2]", "[3, 9]").replace("[2, ", "[9, ")
    with pytest.raises(ApiqError, match=r"small\.yaml, cell 9, rtn: quantize\.bits is 9; it should be at least 1 and"):
        plan(write(text))
    marked = plan(write(text + "refused: {codes have 8 bits at most: {quantize.bits: 9}}\n"))
    assert [cell.refused for cell in marked.cells] == [None, None, *["codes have 8 bits at most"] * 2]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("quantize.rank: 4", "quantize.ranks: 4", "cell 3, bw: quantize.ranks is not a parameter; did you mean rank?"),
        ("finetune.task", "finetune", "base: the parameter 'finetune' is not of the form section.key, as in"),
        ("finetune.task: none, ", "", "cell 3, rtn: quantize.method is rtn, which leaves no adapters to finetune"),
    ],
)
def test_parameters_of_every_cell_are_checked_as_a_whole(write, place, old, new, told):
    with pytest.raises(ApiqError) as caught:
        plan(write((place / write()).read_text().replace(old, new)))
    assert told in str(caught.value)


def test_what_varies_cannot_be_set_for_all(write):
    with pytest.raises(ApiqError, match=r"varies quantize\.bits, so it cannot be set for all cells; leave out -S"):
        plan(write(), settings=["quantize.bits=4"])


def test_a_model_and_texts_on_disk_take_the_place_of_the_demo(write, place):
    for name in ("train.txt", "test.txt"):
        (place / name).write_text("text")
    planned = plan(write(), local=Local(None, "train.txt", "test.txt"), settings=["evaluate.perplexity.text.windows=7"])
    settings = planned.cells[0].settings
    assert settings["calibration.corpus"] == settings["finetune.text"] == str(place / "train.txt")
    assert settings["evaluate.perplexity.text.text"] == str(place / "test.txt")
    assert settings["evaluate.perplexity.text.windows"] == 7
    mixed = plan(write(), settings=["calibration.mixture=[c4, train.txt]"]).cells[0].settings
    assert mixed["calibration.mixture"] == ["c4", str(place / "train.txt")]
    with pytest.raises(ApiqError, match=r"model\.source is .*gone/; it should be demo, a folder that is there"):
        plan(write(), local=Local("gone/"))


def test_a_profile_brings_its_model_and_settings_by_choice(write, place):
    text = (place / write()).read_text() + (
        "profiles: {tiny: {params: ci, base: {quantize.epochs: 3}, grid: {method: {bw: {quantize.lr_theta: 0.05}}}}}\n"
    )
    planned = plan(write(text), "tiny")
    assert planned.name == "small-tiny"
    assert planned.cells[1].settings["quantize.lr_theta"] == 0.05
    assert "quantize.lr_theta" not in planned.cells[0].settings
    with pytest.raises(ApiqError, match=r"small\.yaml has no profile big; it has tiny\."):
        plan(write(text), "big")


def test_cells_beside_the_grid_have_no_choice_on_its_other_axes(write, place):
    text = (place / write()).read_text() + "cells: {plain: {quantize.method: gptq}}\n"
    assert plan(write(text)).cells[-1].labels == {"quantize.bits": "plain", "method": "-"}
    alone = "title: A\ncells: {one: {quantize.bits: 3}}\ntable: {rows: [cell], metrics: {bits: effective_bits}}\n"
    assert [cell.labels for cell in plan(write(alone)).cells] == [{"cell": "one"}]


def test_the_example_of_the_documentation_is_a_sweep(write):
    page = (ROOT / "docs" / "reference" / "sweeps.md").read_text()
    path = write(page.split("```yaml\n")[1].split("```")[0], "example.yaml")
    found = plan(path)
    assert len(found.cells) == 7
    assert [cell.labels["method"] for cell in found.cells if cell.refused] == ["apiq, rank 4"]
    assert plan(path, "llama2-7b").cells[5].settings["quantize.lr_theta"] == 0.005


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_can_be_run_on_the_demo_as_it_stands(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    planned = plan(path)
    assert any(cell.refused is None for cell in planned.cells)
    for name, profile in planned.sweep.profiles.items():
        if Path(profile.base.get("model.source", ".")).exists():  # beside the repository, for those who have it
            assert len(plan(path, name).cells) >= len(planned.cells)
    assert read_yaml(path)["title"]


def test_task_folders_outside_the_repository_are_found_from_its_clones(write, place):
    (place.parent / "own-tasks").mkdir(exist_ok=True)
    text = (place / write()).read_text().replace("evaluate.tasks: []", "evaluate.task_folder: ../own-tasks")
    assert plan(write(text)).cells[0].settings["evaluate.task_folder"] == str(place.parent / "own-tasks")
