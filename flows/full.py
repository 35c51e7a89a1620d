"""The flow `apiq`: the stages of the pipeline in order, watched, retried and cancelled one by one.

`python -m flows.full [section.key=value ...]` runs it here and now, `python -m flows.serve` waits
for `prefect deployment run apiq/full`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State

from apiq.errors import ApiqError
from apiq.overrides import leaves, override
from apiq.params import Params
from flows import ROOT, server
from flows.board import Board
from flows.pipeline import STAGES, StageRefused, gpu_slot, reproduce
from flows.results import keep_report, metrics_rows, summary
from flows.workspace import METRICS, alone, call, changed, dvc, experiment_name, refuse_taken
from stages import read_params


@flow(name="apiq")
def full(params: dict[str, Any] | None = None, name: str | None = None) -> State:
    """Quantize, finetune and evaluate a model as params.yaml says, stage by stage through DVC.

    Args:
        params: changes to params.yaml by their path, as in {"quantize.bits": 3}. A run with changes becomes a
            DVC experiment, and the workspace is left as it was.
        name: name of that experiment; made from the changes and the name of the run where it is not given.
    """
    tell = get_run_logger().info
    try:
        with contextlib.chdir(ROOT), alone(ROOT, tell):
            changes, run = params or {}, str(flow_run.get_name())
            experiment = name or (experiment_name(changes, run) if changes else None)
            if experiment:
                refuse_taken(experiment, ROOT)
            with changed(changes, ROOT, tell):
                outcomes = _run_stages(read_params())
                if experiment:
                    call(dvc("exp", "save", "--name", experiment, "--include-untracked", METRICS), ROOT)
                _publish(outcomes, experiment, run)
    except ApiqError as error:
        return Failed(message=str(error))
    return Completed(message=f"saved as the experiment {experiment}" if experiment else "the report is in data/report")


def _may_pass(_task: Any, _run: Any, state: State) -> bool:
    """Whether to try a failed stage again: a refusal would be the same."""
    return not isinstance(state.result(raise_on_failure=False), StageRefused)


@task(
    task_run_name="{stage}", retries=2, retry_delay_seconds=[10, 60], retry_condition_fn=_may_pass,
    cache_policy=NO_CACHE,
)  # fmt: skip
def run_stage(stage: str, slot: str | None) -> State:
    """One `dvc repro` in a process group of its own, which ends with this task whatever happens to it."""
    logger, board = get_run_logger(), Board(stage)

    def on_line(line: str) -> None:
        logger.info(line)
        board.show(line)

    with concurrency(slot) if slot else contextlib.nullcontext():
        outcome = reproduce(stage, ROOT, on_line)
    return Completed(name=outcome, data=outcome)


def _run_stages(params: Params) -> dict[str, str]:
    slots = {stage: gpu_slot(stage, params) for stage in STAGES}
    known = set(_limits({slot for slot in slots.values() if slot}))
    return {stage: run_stage(stage, slot if slot in known else None) for stage, slot in slots.items()}


def _limits(names: set[str]) -> Iterator[str]:
    """Those of `names` for which Prefect has a concurrency limit."""
    with get_client(sync_client=True) as client:
        for name in sorted(names):
            try:
                yield client.read_global_concurrency_limit_by_name(name).name
            except ObjectNotFound:
                hint = f"`prefect gcl create {name} --limit 1` makes runs take turns on the GPU"
                get_run_logger().info("Prefect has no concurrency limit %s; %s.", name, hint)


def _publish(outcomes: dict[str, str], experiment: str | None, run: str) -> None:
    report = keep_report(run, ROOT)
    create_table_artifact(metrics_rows(ROOT), key="metrics", description=experiment or "params.yaml as it is")
    create_link_artifact(report.as_uri(), link_text=f"Report of {run}", key="report")
    create_markdown_artifact(summary(outcomes, experiment, report), key="summary")


def given(arguments: list[str]) -> dict[str, Any]:
    """The changes of a command line by their paths; `section.key={}` empties a table."""
    changes: dict[str, Any] = {}
    for argument in arguments:
        changes |= leaves(override({}, [argument])) or {argument.partition("=")[0].strip(): {}}
    return changes


def _main(arguments: list[str]) -> int:
    try:
        changes = given(arguments)
    except ApiqError as error:
        print(error, file=sys.stderr)
        return 1
    server.start()
    state = full(changes, return_state=True)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
