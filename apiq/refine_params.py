"""The section `refine` of params.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from apiq.recipes import Recipe, filled
from apiq.refusals import require
from apiq.section import Decay, Device, DType, Positive, Rate, Section, Seed


class RefineParams(Section):
    """Training of adapters and scales, end to end, against the predictions of the full-precision model."""

    recipe: Recipe = "best"
    """Where epochs and generated come from when they are left open: best, or paper or fast (no refinement)."""
    epochs: Annotated[int, Field(ge=0)] = 2
    """Passes over the calibration windows and the generated ones; 0 leaves the quantized model as it is."""
    generated: Annotated[int, Field(ge=0)] = 8
    """Windows that the quantized model writes itself for every calibration window, each going on from a piece of one,
    and that the full-precision model judges like the others. A few windows of text alone are soon learnt by heart."""
    prompt: Positive = 16
    """Tokens of a calibration window from which a generated one goes on."""
    top_k: Positive = 64
    """Tokens whose predictions are kept for every position; all others count as one."""
    hidden_weight: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Weight of the squared distance between the last hidden states of the two models, relative to the size of the
    states, beside the divergence of their predictions, in nats; 0 leaves the states out."""
    batch_size: Positive = 4
    """Windows in a step."""
    shuffle: bool = True
    """Take the batches of windows in another random order in every pass."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """The learning rates stay, or fall to 0 along a cosine."""
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the windows, the last ones, that is not trained on; the state with the lowest loss on them is kept.
    0: all are trained on, and the last state is kept."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Passes without a lower loss on the held-out windows after which it is done; 0: never. Needs held_out."""
    lr_adapter: Rate = 0.001
    """Learning rate of A and B, or of the parameters of another adapter."""
    lr_scales: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate of the scales, relative to their size; 0 leaves them as they are. For models without adapters:
    beside adapters it did not pay (docs/quality.md)."""
    adapter_bits: Literal[8, 4] | None = None
    """Store the matrices of the adapters in so many bits, and train them as they will be rounded; none: as they are."""
    weight_decay: Decay = 0.0
    """AdamW weight decay of the adapters."""
    activation_checkpointing: Literal[False, True, "auto"] = "auto"
    """Compute the activations of a block again in the backward pass: less memory, a third more time. auto: on a GPU."""
    dtype: DType = "auto"
    """Arithmetic: auto is bfloat16 on a GPU and float32 on a CPU."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    seed: Seed = 0
    """Seed of the generated windows and of the order of all."""

    @model_validator(mode="before")
    @classmethod
    def _by_recipe(cls, values: Any) -> Any:
        return filled("refine", values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _combinations(self) -> RefineParams:
        require(not self.patience or self.held_out > 0, "patience", self.patience, "0 when held_out is 0")
        reason = "epochs is 0: nothing is refined, as with the recipes paper and fast"
        trained = self.epochs > 0
        require(trained or not self.lr_scales, "lr_scales", self.lr_scales, f"0 when {reason}")
        require(trained or self.adapter_bits is None, "adapter_bits", self.adapter_bits, f"empty when {reason}")
        return self
