"""Wait for runs of the deployments apiq/full and apiq/sweep and do them here, one after another."""

from prefect import serve

from flows.full import full
from flows.sweep import sweep

if __name__ == "__main__":
    serve(
        full.to_deployment("full", description="The whole pipeline, as params.yaml of this folder says."),
        sweep.to_deployment("sweep", description="Every cell of a sweep file, each an experiment."),
        limit=1,
    )
