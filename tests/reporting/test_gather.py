import pytest

from apiq.errors import ApiqError
from apiq.reporting.gather import BlockLoss, Folders, gather


def test_what_the_stages_left_is_read(data):
    run = gather(Folders.below(data))
    assert [block.block for block in run.blocks] == [0, 1]
    assert all(block.last < block.first for block in run.blocks)
    assert {(curve.block, curve.group, curve.epochs) for curve in run.curves} == {
        (0, "block", (0, 1, 2)),
        (1, "block", (0, 1, 2)),
    }
    assert run.training.training == ((1, 2.5), (2, 2.25))
    assert run.training.held_out == ((0, 2.75), (2, 2.125))
    assert set(run.timing) == {"model", "quantize"}
    assert run.manifests["evaluate"]["perplexity"]["demo"]["windows"] == 17
    assert run.absent == {}


def test_what_is_not_there_is_absent_with_a_reason(tmp_path):
    run = gather(Folders(finetuned=tmp_path))
    assert run.absent["finetuned"] == "There is no log.csv of the finetuning: it has not been run."
    assert run.absent["evaluation"] == "The evaluation was left out of this report."


def test_the_cost_of_an_older_report_is_not_read(tmp_path):
    (tmp_path / "report.json").write_text('{"seconds": 1.0}')
    assert gather(Folders(timing=tmp_path)).timing == {}


def test_losses_that_are_not_finite_are_none(tmp_path):
    (tmp_path / "metrics.json").write_text('{"blocks": [{"loss_first": NaN, "loss_last": 0.5}, {"loss_last": null}]}')
    assert gather(Folders(quantized=tmp_path)).blocks == (BlockLoss(0, None, 0.5), BlockLoss(1, None, None))


@pytest.mark.parametrize(
    ("content", "said"),
    [("step,loss\n1,2\n", "no column held_out_loss"), ("step,loss,held_out_loss\n1,oops,\n", "'oops'")],
)
def test_a_damaged_log_is_refused(tmp_path, content, said):
    (tmp_path / "log.csv").write_text(content)
    with pytest.raises(ApiqError, match=said):
        gather(Folders(finetuned=tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("timing/quantize.json", "[1, 2]", "its content is no JSON object"),
        ("evaluation/metrics.json", '{"full": null}', "full is no JSON object"),
        ("evaluation/metrics.json", '{"full": {"perplexity": 3}}', "perplexity is no JSON object"),
        ("evaluation/metrics.json", '{"full": {"tasks": {"sums": 0.5}}}', "sums is no JSON object"),
        ("evaluation/results.json", "[]", "its content is no JSON object"),
        ("evaluation/results.json", '{"full": {"protocol": []}}', "protocol is no JSON object"),
        ("refined/apiq.json", '{"parameters": 1}', "parameters is no JSON object"),
        ("quantized/metrics.json", '{"bits": 2}', "bits is no JSON object"),
        ("quantized/metrics.json", '{"blocks": [1]}', "blocks is no list of JSON objects"),
    ],
)
def test_json_of_another_shape_is_refused(tmp_path, name, content, said):
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ApiqError, match=rf"{name} is damaged: {said}; run the stage that writes it again"):
        gather(Folders.below(tmp_path))
