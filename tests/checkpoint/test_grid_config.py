"""A grid is read as it was written, and a folder of format 1 as the affine grid that it holds."""

import pytest

from apiq.checkpoint.grid_config import described, grid_entries, grid_for, grid_of
from apiq.checkpoint.quantizer import ApiqConfig
from apiq.errors import ApiqError
from apiq.grids.affine import Grid
from apiq.grids.normal_float import NormalFloat

GRIDS = [Grid(2, 64, False), Grid(3, 0, True), NormalFloat(4, 32), NormalFloat(2, 0, double=True)]
GRIDS += [Grid(1, 32, "balanced"), Grid(1.58, 43, True)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_grid_is_read_as_it_was_written(grid):
    assert grid_of(described(grid)) == grid
    config = ApiqConfig(**described(grid), blocks="model.layers", linears=["q"])
    assert config.grid == grid
    assert ApiqConfig(**config.to_dict()).grid == grid


def test_a_symmetry_that_is_not_known_is_refused():
    with pytest.raises(ApiqError, match=r"symmetric in config\.json is 'skewed'; it should be false, true or balanced"):
        grid_of({**described(Grid(2, 64, True)), "symmetric": "skewed"})


@pytest.mark.parametrize(("bits", "symmetric"), [(1.6, True), (9, False), (1.58, False), (1.58, "balanced")])
def test_bits_that_are_not_known_are_refused(bits, symmetric):
    with pytest.raises(ApiqError, match=r"bits in config\.json is 1\.\d+|bits in config\.json is 9"):
        grid_of({**described(Grid(2, 64, True)), "bits": bits, "symmetric": symmetric})


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_folder_of_format_1_holds_the_affine_grid(symmetric):
    old = {"quant_method": "apiq", "format": 1, "bits": 3, "group_size": 32, "symmetric": symmetric}
    assert grid_of(old) == ApiqConfig(**old, blocks="model.layers", linears=["q"]).grid == Grid(3, 32, symmetric)


@pytest.mark.parametrize("offsets", [False, True])
def test_the_grid_of_most_linears_is_the_usual_one_and_the_others_are_read_as_they_were_written(offsets):
    usual = Grid(2, 64, False, offsets=offsets)
    grids = {f"0.{number}": grid for number, grid in enumerate([usual, *GRIDS, Grid(3, 64, False, offsets=offsets)])}
    grids["1.0"] = grids["1.1"] = usual
    config = grid_entries(grids)
    assert described(usual).items() <= config.items() and config["exceptions"].keys().isdisjoint({"0.0", "1.0", "1.1"})
    assert config["exceptions"][f"0.{len(GRIDS) + 1}"] == {"bits": 3}
    read = ApiqConfig(**config, blocks="model.layers", linears=["q"])
    for name, grid in {**grids, "2.0": usual}.items():
        assert grid_for(config, name) == read.grid_for(name) == ApiqConfig(**read.to_dict()).grid_for(name) == grid
