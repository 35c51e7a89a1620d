"""What the commands print for people: values as they are, whatever they hold."""

from types import SimpleNamespace

from apiq.cli_output import show
from apiq.cli_planning import _show
from apiq.cli_sweep import _show_cells

NAME = "q[/x][bold]y[attn]"


def test_results_are_printed_as_they_are(capsys):
    show({"folder": NAME, "texts": {NAME: 1.0}, "names": [NAME]}, as_json=False)
    assert capsys.readouterr().out.count(NAME) == 3


def test_cells_are_printed_as_they_are(capsys):
    cell = SimpleNamespace(name="one", labels={"targets": NAME}, refused=f"no {NAME}")
    _show_cells(SimpleNamespace(cells=[cell]), as_json=False)
    assert capsys.readouterr().out == f"one  targets {NAME} refused: no {NAME}\n"


def test_a_plan_is_printed_as_it_is(capsys):
    model = {"source": NAME, "kind": "Llama", "blocks": 2, "width": 8}
    model |= {"parameters": 1, "bytes": 1, "quantized_weights": 1}
    bits = dict.fromkeys(("total", "codes", "scales", "zeros", "adapters"), 0.0)
    phases = dict.fromkeys(("quantize", "refine", "finetune", "evaluate"))
    made = {"bits": bits, "bytes": 1, "adapter_bytes": 1}
    _show({"model": model, "result": made, **phases, "offloaded": [], "problems": [NAME]})
    assert capsys.readouterr().out.count(NAME) == 2
