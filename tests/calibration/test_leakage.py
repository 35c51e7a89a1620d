import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apiq.calibration.leakage import RUN, run_length, sample_clean_windows
from apiq.calibration.windows import sample_windows
from apiq.errors import ApiqError


def noise(size, seed=0):
    return torch.randint(0, 2000, (size,), generator=torch.Generator().manual_seed(seed))


def seeded():
    return torch.Generator().manual_seed(3)


def test_windows_of_another_text_are_those_of_plain_sampling():
    text = noise(20_000)
    clean, left_out = sample_clean_windows(text, 64, 128, seeded(), {"other": noise(20_000, seed=1)})
    assert left_out == 0
    assert torch.equal(clean, sample_windows(text, 64, 128, seeded()))


def planted(size, at, run):
    """A text, and an evaluated one that has `run` tokens in common with it."""
    text, evaluated = noise(size), noise(4_000, seed=1)
    evaluated[1_000 : 1_000 + run] = text[at : at + run]
    return text, evaluated


def test_windows_over_a_planted_run_are_left_out_and_replaced():
    text, evaluated = planted(20_000, 4_000, 200)
    clean, left_out = sample_clean_windows(text, 400, 128, seeded(), {"other": noise(500, 2), "planted": evaluated})
    drawn = sample_windows(text, 400, 128, seeded())
    copies = {tuple(run.tolist()) for run in evaluated.unfold(0, RUN, 1)}
    leaking = [window for window in drawn if any(tuple(run.tolist()) in copies for run in window.unfold(0, RUN, 1))]
    assert left_out >= len(leaking) > 0
    assert clean.shape == (400, 128)
    assert not any(tuple(run.tolist()) in copies for window in clean for run in window.unfold(0, RUN, 1))


@given(start=st.integers(0, 100 - RUN))
def test_a_run_is_found_wherever_it_lies_in_the_window(start):
    text, evaluated = noise(100), noise(400, seed=1)
    evaluated[200 : 200 + RUN] = text[start : start + RUN]
    with pytest.raises(ApiqError, match="8 of 8 windows"):
        sample_clean_windows(text, 8, 100, seeded(), {"e": evaluated})


def test_one_token_less_is_chance():
    text, evaluated = noise(100), noise(400, seed=1)
    evaluated[200 : 200 + RUN - 1] = text[10 : 10 + RUN - 1]
    assert sample_clean_windows(text, 8, 100, seeded(), {"e": evaluated})[1] == 0


@pytest.mark.parametrize(
    ("characters", "tokens", "run"), [(4000, 1000, 50), (9000, 1000, 50), (1000, 1000, 200), (0, 0, 50)]
)
def test_a_run_is_as_long_as_text_that_is_not_equal_by_chance(characters, tokens, run):
    assert run_length(characters, tokens) == run


def test_tokens_of_a_character_each_may_have_a_phrase_in_common():
    text, evaluated = noise(400), noise(400, seed=1)
    evaluated[100:300] = text[:200]
    assert sample_clean_windows(text[:299], 8, 256, seeded(), {"e": evaluated[:299]}, run=200)[1] == 0
    with pytest.raises(ApiqError, match="repeat 200 tokens"):
        sample_clean_windows(text[:256], 8, 256, seeded(), {"e": evaluated}, run=200)


def test_a_window_shorter_than_a_run_counts_as_a_whole():
    text = noise(1_000)
    with pytest.raises(ApiqError, match="repeat 16 tokens"):
        sample_clean_windows(text, 10, 16, seeded(), {"e": text[:600]})


def test_refused_beyond_five_percent_with_the_name_of_the_text():
    text, evaluated = planted(20_000, 4_000, 2_500)
    with pytest.raises(ApiqError, match=r"of 500 windows .* \(wiki\)"):
        sample_clean_windows(text, 500, 128, seeded(), {"other": noise(3_000, 2), "wiki": evaluated})


def test_nothing_evaluated():
    text = noise(500)
    clean, left_out = sample_clean_windows(text, 5, 64, seeded(), {})
    assert left_out == 0 and torch.equal(clean, sample_windows(text, 5, 64, seeded()))


def test_an_evaluated_text_shorter_than_a_run():
    assert sample_clean_windows(noise(500), 5, 64, seeded(), {"short": noise(10)})[1] == 0
