"""The section `quantize` of params.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from apiq.adapters.tuners import REFUSED
from apiq.method_params import (
    WITHOUT_ADAPTERS,
    WITHOUT_CALIBRATION,
    Bits,
    ClosedFormParams,
    GptqParams,
    GroupSize,
    LoftqParams,
    LqLoraParams,
    Method,
    OmniquantParams,
    QloraParams,
    Symmetry,
)
from apiq.method_rules import combinations
from apiq.recipes import Recipe, filled
from apiq.refusals import require
from apiq.section import Decay, Device, DType, Positive, Rate, Section, Seed

Adapter = Literal[
    "none", "lora", "rslora", "dora", "pissa", "olora", "adalora", "adamss", "beft", "boft", "c3a", "deft", "delora",
    "fourierft", "gralora", "hira", "hiwi", "houlsby", "hra", "ia3", "loha", "lokr", "miss", "oft", "osf", "peanut",
    "psoft", "pvera", "randlora", "road", "shira", "supertuning", "tinylora", "vblora", "vera", "waveft",
]  # fmt: skip


class QuantizeParams(Section):
    """How the codes, clipping ranges and adapters are found (sections 4.1 to 4.3 of the paper)."""

    recipe: Recipe = "best"
    """Where ranges, start, epochs, batch_size, shuffle, schedule, learning rates and decays come from when they are
    left open: paper (Table A.1), best, or fast (`apiq/recipes.py`)."""
    method: Method = "apiq-bw"
    """Without adapters: rtn (round to nearest), gptq, awq, omniquant. With adapters that start at zero: qlora,
    gptq-lora. Weight-preserving: loftq, lq-lora. Activation-preserving: closed-form, apiq-lw (Algorithm 1, layer by
    layer), apiq-bw (block by block)."""
    bits: Bits = 2
    """Bits of a code, b: 1 to 8, or 1.58 for the three levels -s, 0 and s."""
    group_size: GroupSize = 64
    """Weights that share a scale and a zero point, g; 0 for one group a row. Need not divide the width."""
    target_bits: Annotated[float, Field(gt=0, le=16)] | None = None
    """Mean bits of a weight with its share of scales and zero points that are divided among the linears where they
    count most; none: all have `bits` and `group_size`. Adapters are not counted."""
    candidate_bits: Annotated[list[Bits], Field(min_length=1)] = [2, 3, 4]  # noqa: RUF012 (pydantic copies it)
    """Bits that a linear may get under target_bits."""
    candidate_group_sizes: Annotated[list[GroupSize], Field(min_length=1)] = [32, 64, 128]  # noqa: RUF012
    """Group sizes that a linear may get under target_bits."""
    candidate_ranks: list[Positive] = Field(default_factory=list)
    """Ranks that the adapter of a linear may get; none: all have `rank`. The adapters of all linears together take no
    more than with `rank` everywhere, and act as alpha / `rank` * A B^T whatever rank they get. lora, rslora or dora."""
    sensitivity: Literal["fisher", "none"] = "fisher"
    """What an error of a weight counts where bits or ranks are divided: its Fisher information, from gradients of the
    whole model on the calibration windows, or the same everywhere."""
    symmetric: Symmetry = False
    """Fixed zero point instead of one a group: true is 2^(b-1); balanced (set by -S) is
    (2^b - 1) / 2, with as many levels below 0 as above and none at 0. 1.58 bits are -s, 0 and s whatever it says."""
    rank: Positive = 64
    """Rank r of the adapters A (in x r) and B (out x r), or what sets the size of another kind of adapter."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """LoRA scaling: the adapters act as alpha / r * A B^T. Only for adapters that have it."""
    adapter: Adapter = "lora"
    """What is trained beside the codes: a tuner of PEFT, hiwi, houlsby, or none for the quantizer alone.
    adapters.md in docs/reference lists them, with what rank and alpha are for each."""
    adapter_targets: Annotated[list[str], Field(min_length=1)] = ["all"]  # noqa: RUF012 (pydantic copies it)
    """Linears that carry adapters: all, attn, ffn, names as in self_attn.q_proj, or ends of names as in q_proj.
    The others are quantized all the same."""
    pooled: bool = False
    """Keep A of lora and rslora constant within the groups of the grid, so that `apiq merge --into zeros` is exact
    (QA-LoRA, arXiv 2309.14717). For apiq-lw, apiq-bw and gptq-lora; refinement keeps it so, and finetune.pooled."""
    adapter_options: dict[str, Any] = Field(default_factory=dict)
    """More fields of the tuner's config in PEFT, as in {use_dora: true}."""
    ranges: Literal["whole", "weight", "output"] = "whole"
    """Start of the clipping ranges in apiq-lw and apiq-bw: the whole range of a group as in the paper, or the one
    found by search that costs the weight, or the output on calibration, least."""
    start: Literal["default", "closed-form"] = "default"
    """Start of A and B in apiq-lw and apiq-bw: A at random and B = 0, or the best ones for the unfitted codes, found on
    as many windows as their second moments need."""
    epochs: Annotated[int, Field(ge=0)] = 20
    """Passes over the calibration windows for each block (or layer)."""
    batch_size: Positive = 1
    """Windows in a step. The learning rates are used as they are and were chosen for steps of 1 window; for b windows
    multiply both by sqrt(b), the rule for AdamW (arXiv 2205.10287). Steps of few windows are slower and fit better."""
    shuffle: bool = False
    """Take the batches of windows in another random order in every pass; Table A.1 keeps one order."""
    rounding: Literal["straight-through", "soft"] = "straight-through"
    """In apiq-lw, apiq-bw and omniquant: rounding to nearest with the gradient of the identity, or a smooth staircase
    with its own gradient, which is annealed to rounding to nearest over the steps."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rates stay, as in Table A.1, or fall to 0 along a cosine over the steps of a block."""
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the windows, the last ones, that is not trained on; the state with the lowest loss on them is kept.
    0: all are trained on, and the last state is kept."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Passes without a lower loss on the held-out windows after which a block is done; 0: never. Needs held_out."""
    lr_theta: Rate = 0.005
    """Learning rate of the clipping factors gamma and beta."""
    decay_theta: Decay = 0.1
    """AdamW weight decay of gamma and beta; pulls the clipping factors towards sigmoid(0) = 1/2."""
    lr_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """In apiq-lw and apiq-bw: learning rate of W itself, in scales s of its group, through the straight-through
    gradient (Block-AP, arXiv 2407.11062); 0 leaves W as it is. W is discarded once its codes are made."""
    lr_adapter: Rate = 0.0005
    """Learning rate of A and B, or of the parameters of another adapter."""
    decay_adapter: Decay = 0.1
    """AdamW weight decay of A and B. Biases, and scales that do nothing at 1, are spared."""
    second_term: bool = True
    """Add the second loss term of the authors' code, which is not in the paper (apiq-bw only):
    the full-precision block on the quantized input is a second target."""
    dtype: DType = "auto"
    """Arithmetic of the solver: auto is bfloat16 autocast on a GPU, and on a CPU that multiplies it where blocks have
    more than 4 million weights; else float32."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    activations: Literal["auto", "device", "memory", "disk"] = "auto"
    """Where the inputs and targets of a block are kept: on the device, in memory (pinned) or in files in the work
    folder; auto takes the first in which they fill at most half of what is free."""
    seed: Seed = 0
    """Seed of the initial A and of every random choice."""
    gptq: GptqParams = Field(default_factory=GptqParams)
    """For methods gptq and gptq-lora."""
    omniquant: OmniquantParams = Field(default_factory=OmniquantParams)
    """For method omniquant."""
    qlora: QloraParams = Field(default_factory=QloraParams)
    """For method qlora."""
    loftq: LoftqParams = Field(default_factory=LoftqParams)
    """For method loftq."""
    lq_lora: LqLoraParams = Field(default_factory=LqLoraParams)
    """For method lq-lora."""
    closed_form: ClosedFormParams = Field(default_factory=ClosedFormParams)
    """For method closed-form and for start closed-form."""

    @property
    def adapted(self) -> bool:
        """Whether adapters are left to finetune."""
        return self.method not in WITHOUT_ADAPTERS and self.adapter != "none"

    @property
    def largest_rank(self) -> tuple[str, int]:
        """The largest rank that a linear may get, after the key that says so."""
        return ("candidate_ranks", max(self.candidate_ranks)) if self.candidate_ranks else ("rank", self.rank)

    @property
    def divided(self) -> bool:
        """Whether each linear gets a grid or a rank of its own."""
        return self.target_bits is not None or bool(self.candidate_ranks)

    @property
    def calibrated(self) -> bool:
        """Whether the method needs calibration windows."""
        return self.method not in WITHOUT_CALIBRATION or self.fisher

    @property
    def fisher(self) -> bool:
        """Whether gradients of the loss of the whole model are taken first."""
        return (self.divided and self.sensitivity == "fisher") or (
            self.method == "lq-lora" and self.lq_lora.weights == "fisher"
        )

    @property
    def normal_float(self) -> bool:
        """Whether the levels are those of NormalFloat."""
        levels = {"qlora": "normal-float", "loftq": self.loftq.levels, "lq-lora": self.lq_lora.levels}
        return levels.get(self.method) == "normal-float"

    @model_validator(mode="before")
    @classmethod
    def _usable(cls, values: Any) -> Any:
        name = values.get("adapter") if isinstance(values, Mapping) else None
        reason = REFUSED.get(name) if isinstance(name, str) else None
        require(reason is None, "adapter", name, f"another one: {reason}")
        return filled("quantize", values) if isinstance(values, Mapping) else values

    @field_validator("adapter_targets", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """One text is a list too: attn, or q_proj,v_proj."""
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _combinations(self) -> QuantizeParams:
        two = self.symmetric is True and self.bits == 1
        require(not two, "bits", self.bits, "at least 2 when symmetric is true; 1 bit can be balanced")
        require(not self.patience or self.held_out > 0, "patience", self.patience, "0 when held_out is 0")
        combinations(self)
        return self
