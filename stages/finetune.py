"""Train the adapters on the frozen packed model, or leave them as they were fitted."""

from apiq.params import Params
from apiq.progress import Progress
from stages import FINETUNED, REFINED, run


def main(params: Params, progress: Progress) -> None:
    """data/refined/ to data/finetuned/."""
    if params.finetune.task == "none":
        from apiq.checkpoint.skipped import write

        write(REFINED, FINETUNED)
        return
    from apiq.finetuning.run import finetune

    finetune(REFINED, params.finetune, FINETUNED, progress)


if __name__ == "__main__":
    run("finetune", main)
