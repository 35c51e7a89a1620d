"""Train the adapters on the frozen packed model."""

from apiq.params import Params
from apiq.progress import Progress
from stages import FINETUNED, REFINED, run


def main(params: Params, progress: Progress) -> None:
    """data/refined/ to data/finetuned/."""
    from apiq.finetuning.run import finetune

    finetune(REFINED, params.finetune, FINETUNED, progress)


if __name__ == "__main__":
    run("finetune", main)
