"""Wait for runs of the deployment apiq/full and do them here, one after another: `python -m flows.serve`."""

from flows.full import full

if __name__ == "__main__":
    full.serve(name="full", description="The whole pipeline, as params.yaml of this folder says.", limit=1)
