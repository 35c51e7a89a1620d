"""The changes that are given on the command line of the flow."""

from flows.full import given


def test_an_empty_table_is_a_change_too() -> None:
    assert given(["quantize.adapter_options={}", "quantize.bits=3", "quantize.bits=4"]) == {
        "quantize.adapter_options": {},
        "quantize.bits": 4,
    }
