"""The flow as Prefect runs it, on a scratch repository whose stages only pretend."""

from pathlib import Path

import pytest

from flows.workspace import call, dvc

pytestmark = pytest.mark.slow


def artifacts() -> dict[str, object]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return {artifact.key or "": artifact.data for artifact in client.read_artifacts()}


def test_a_changed_run_is_an_experiment_and_a_wrong_one_is_refused(
    repository: Path, prefect: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.full import full

    monkeypatch.setattr("flows.full.ROOT", repository)
    before = (repository / "params.yaml").read_bytes()

    refused = full({"quantize.bits": 9}, return_state=True)
    assert refused.is_failed()
    assert refused.message == "quantize.bits is 9; it should be at least 1 and at most 8."
    assert not (repository / "dvc.lock").exists()

    done = full({"quantize.bits": 3}, name="three-bits", return_state=True)
    assert done.is_completed(), done.message
    assert (repository / "params.yaml").read_bytes() == before
    assert call(dvc("exp", "list", "--name-only"), repository).split() == ["three-bits"]

    made = artifacts()
    assert {"metrics", "report", "summary", "progress-quantize"} <= made.keys()
    assert "inner.bits" in str(made["metrics"])
    assert "three-bits" in str(made["summary"])

    taken = full({"quantize.bits": 4}, name="three-bits", return_state=True)
    assert taken.is_failed()
    assert "there is an experiment three-bits already" in str(taken.message)
