import pytest

from apiq.reporting import units
from apiq.reporting.units import MINUS, TIMES


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.03307, "2.033"), (9.99996, "10.00"), (0.0123456, "0.01235"), (12345.6, "12,350"), (-1.5, f"{MINUS}1.500"),
        (1.8e6, f"1.800 {TIMES} 10⁶"), (0.00012, f"1.200 {TIMES} 10⁻⁴"), (0.0, "0"), (921600, "921,600"),
        (-3, f"{MINUS}3"),
    ],
)  # fmt: skip
def test_four_digits_whatever_the_size(value, text):
    assert units.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"), (3725, "1 h 02 min"), (360000, "100 h 00 min"),
    ],
)  # fmt: skip
def test_durations_never_show_sixty(seconds, text):
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("mebibytes", "text"),
    [(0.5, "512 KiB"), (1, "1.00 MiB"), (900.4, "900 MiB"), (1024, "1.00 GiB"), (2560, "2.50 GiB")],
)
def test_memory_in_the_unit_that_fits(mebibytes, text):
    assert units.memory(mebibytes) == text


def test_signs_and_shares():
    assert units.signed(0.25) == "+0.2500"
    assert units.signed(-0.25) == f"{MINUS}0.2500"
    assert units.signed(0.0) == "0"
    assert units.nats(-0.00001) == "0.0000"
    assert units.nats(0.19551) == "+0.1955"
    assert units.percent(0.0995) == "10 %"
    assert units.percent(0.0123) == "1.2 %"
    assert units.percent(0.0) == "0 %"
    assert units.percent(-0.5) == f"{MINUS}50 %"


def test_a_value_is_as_long_as_its_error():
    assert units.uncertain(0.41234, 0.0213) == ("0.412", "0.021")
    assert units.uncertain(12.3456, 1.9) == ("12.3", "1.9")
    assert units.uncertain(0.4, 0.0) == ("0.4000", "0")


def test_booleans_strings_and_infinities_are_no_numbers():
    assert [units.known(value) for value in (1, 2.5, True, "1", None, float("nan"), float("inf"))] == [True] * 2 + [
        False
    ] * 5


def test_short_names_stay_apart():
    names = ["encoder.attention.output.dense", "encoder.output.dense", "encoder.query"]
    assert list(units.short_names(names).values()) == ["attention.output.dense", "encoder.output.dense", "query"]
