import math

import pytest

from apiq.reporting import results
from apiq.reporting.gather import Run

TWO = {
    "full": {"perplexity": {"a": math.e, "b": math.e}},
    "quantized": {"perplexity": {"a": math.e**2, "b": math.e**4}},
}


def run(evaluation, **quantization):
    recorded = {"quantize": {"parameters": {"bits": 2}}}
    return Run(None, recorded, quantization={"method": "apiq-bw", **quantization}, evaluation=evaluation)


def test_losses_are_differences_of_log_perplexity():
    assert results.losses(TWO) == {"a": {"quantized": pytest.approx(1)}, "b": {"quantized": pytest.approx(3)}}
    assert results.mean_loss(TWO, "quantized") == pytest.approx(2)


def test_a_text_without_a_number_leaves_no_mean():
    broken = {**TWO, "quantized": {"perplexity": {"a": 3.0, "b": float("inf")}}}
    assert results.mean_loss(broken, "quantized") is None
    assert "b" not in results.losses(broken)


def test_the_headline_tells_bits_loss_and_what_comes_back():
    evaluation = {**TWO, "finetuned": {"perplexity": {"a": math.e, "b": math.e**3}}}
    assert results.headline(run(evaluation, bits={"total": 4.5}), "tiny") == (
        "tiny in 2 bits by apiq-bw (4.50 effective bits) loses 2.00 nats of log perplexity on average over a and b. "
        "Finetuning brings back 50 % of that, 1.00 nats."
    )


def test_the_headline_tells_refinement_and_finetuning_apart():
    refined = {**TWO, "refined": {"perplexity": {"a": math.e**1.5, "b": math.e**3.5}}}
    assert results.headline(run(refined), "tiny").endswith("Refinement brings back 25 % of that, 0.500 nats.")
    both = {**refined, "finetuned": {"perplexity": {"a": math.e, "b": math.e**3}}}
    assert results.headline(run(both), "tiny").endswith(
        "Refinement brings back 25 % of that, 0.500 nats. Finetuning brings back 25 % of that, 0.500 nats."
    )
    assert (results.mended(TWO), results.mended(refined), results.mended(both)) == ("finetuned", "refined", "finetuned")


def test_the_headline_tells_divided_bits_as_such():
    divided = Run(None, {"quantize": {"parameters": {"bits": 2, "target_bits": 4.5}}}, quantization={"method": "rtn"})
    assert results.headline(divided, "tiny").startswith("tiny in 4.5 divided bits by rtn.")


def test_the_headline_compares_with_rounding_where_it_was_measured():
    evaluation = {
        name: {"perplexity": {"a": value}} for name, value in (("full", 1.0), ("rtn", 16.0), ("quantized", 2.0))
    }
    assert "loses 0.693 nats of log perplexity on a, 25 % of what rounding to nearest loses." in results.headline(
        run(evaluation), "tiny"
    )


def test_the_headline_of_finetuning_that_hurts_claims_no_rescue():
    evaluation = {**TWO, "finetuned": {"perplexity": {"a": math.e**3, "b": math.e**5}}}
    assert results.headline(run(evaluation), "tiny").endswith("Finetuning changes log perplexity by +1.0000 nats.")


def test_the_headline_without_numbers_says_so():
    assert "has not been measured" in results.headline(run({}), "tiny")
    assert results.headline(Run(None), "tiny") == "tiny has not been quantized."


def test_tasks_come_back_in_the_direction_that_is_better():
    tasks = lambda acc, bits: {"tasks": {"t": {"acc": acc, "bits_per_byte": bits, "odd": acc}}}  # noqa: E731
    evaluation = {"full": tasks(0.5, 1.0), "quantized": tasks(0.3, 3.0), "finetuned": tasks(0.4, 1.5)}
    assert results.task_brought_back(evaluation, "t", "acc") == pytest.approx(0.5)
    assert results.task_brought_back(evaluation, "t", "bits_per_byte") == pytest.approx(0.75)
    assert results.task_brought_back(evaluation, "t", "odd") is None


def test_perplexities_of_tasks_come_back_by_their_logarithm():
    values = {"full": 10.0, "quantized": 1000.0, "finetuned": 100.0}
    evaluation = {model: {"tasks": {"t": {"word_perplexity": value}}} for model, value in values.items()}
    assert results.task_brought_back(evaluation, "t", "word_perplexity") == pytest.approx(0.5)


def test_standard_errors_are_no_metrics_of_their_own():
    evaluation = {"full": {"tasks": {"t": {"exact_match.strict": 0.5, "exact_match_stderr.strict": 0.1}}}}
    assert results.metrics(evaluation) == [("t", "exact_match.strict")]
    assert results.error_name("exact_match.strict") == "exact_match_stderr.strict"
    assert results.error_name("acc") == "acc_stderr"
