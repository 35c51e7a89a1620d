"""The parameters of every stage, validated as a whole.

One model per section of `params.yaml`; the docstring under a field is its documentation and its
unit. The defaults are the settings of the ApiQ paper (arXiv 2402.05147, Tables A.1, A.2 and A.4)
for 2-bit Llama-2-7B. `parse` refuses what cannot be run in one sentence that names the key, the
value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from apiq.adapters.tuners import REFUSED
from apiq.errors import ApiqError
from apiq.refusals import require, sentence

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, le=10)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Method = Literal["rtn", "apiq-lw", "apiq-bw"]
Adapter = Literal[
    "none", "lora", "rslora", "dora", "pissa", "olora", "adalora", "adamss", "beft", "boft", "c3a", "deft", "delora",
    "fourierft", "gralora", "hira", "hiwi", "houlsby", "hra", "ia3", "loha", "lokr", "miss", "oft", "osf", "peanut",
    "psoft", "pvera", "randlora", "road", "shira", "supertuning", "tinylora", "vblora", "vera", "waveft",
]  # fmt: skip
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")]
DType = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A section of params.yaml: immutable, closed to unknown keys, documented field by field."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class DemoModel(Section):
    """The small Llama that the demo trains from scratch on English found in every Python."""

    vocab_size: Annotated[int, Field(ge=300, le=65536)] = 512
    """Entries of the byte-level BPE vocabulary."""
    hidden_size: Annotated[int, Field(ge=16, le=4096)] = 128
    """Width of the residual stream."""
    intermediate_size: Annotated[int, Field(ge=16, le=16384)] = 352
    """Width of the feed-forward layer."""
    layers: Annotated[int, Field(ge=1, le=64)] = 6
    """Number of transformer blocks."""
    heads: Annotated[int, Field(ge=1, le=128)] = 4
    """Attention heads; must divide hidden_size."""
    kv_heads: Annotated[int, Field(ge=1, le=128)] = 2
    """Key and value heads; must divide heads."""
    context: Annotated[int, Field(ge=32, le=8192)] = 256
    """Longest sequence, in tokens."""
    initial_std: Annotated[float, Field(gt=0, le=1)] = 0.17
    """Standard deviation of the initial weights. With the usual 0.02 a few minutes of training leave a model that
    lives in its embeddings, and rounding its linears to 2 bits costs it next to nothing."""
    steps: Positive = 660
    """Optimizer steps."""
    batch_size: Positive = 8
    """Sequences in a step."""
    learning_rate: Rate = 4e-3
    """Peak learning rate of AdamW (linear warm-up, cosine decay)."""
    seed: Seed = 0
    """Seed of the initial weights and of the order of the windows."""

    @model_validator(mode="after")
    def _shape(self) -> DemoModel:
        require(self.hidden_size % self.heads == 0, "heads", self.heads, f"a divisor of hidden_size={self.hidden_size}")
        require(self.heads % self.kv_heads == 0, "kv_heads", self.kv_heads, f"a divisor of heads={self.heads}")
        return self


class ModelParams(Section):
    """Where the full-precision model comes from."""

    source: Annotated[str, Field(min_length=1)] = "demo"
    """`demo`, a local folder in Hugging Face format, or the name of a repository on the hub."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository; must be given for one, and only for one."""
    demo: DemoModel = Field(default_factory=DemoModel)
    """The shape and training of the demo model; used when source is `demo`."""


class CalibrationParams(Section):
    """The token windows on which activations are preserved."""

    corpus: Annotated[str, Field(min_length=1)] = "wikitext2"
    """A .txt, .jsonl or .parquet file, a folder of them, or one of demo, wikitext2, c4, ptb, pile,
    with `:SPLIT` behind the name for another split than train."""
    column: str = "text"
    """Column or key that holds the text in .parquet and .jsonl files."""
    join: str = "\n"
    """What stands between rows when they are joined (the paper's WikiText-2 uses a blank line)."""
    windows: Positive = 128
    """Number of windows n."""
    length: Annotated[int, Field(ge=2)] = 2048
    """Tokens in a window; at most the context of the model."""
    seed: Seed = 0
    """Seed of the random starts."""


class QuantizeParams(Section):
    """How the codes, clipping ranges and adapters are found (sections 4.1 to 4.3 of the paper)."""

    method: Method = "apiq-bw"
    """rtn: round to nearest, no adapters; apiq-lw: Algorithm 1, layer by layer; apiq-bw: block by block."""
    bits: Annotated[int, Field(ge=1, le=8)] = 2
    """Bits of a code, b."""
    group_size: Annotated[int, Field(ge=0)] = 64
    """Weights that share a scale and a zero point, g; 0 for one group a row. Need not divide the width."""
    symmetric: bool = False
    """Fixed zero point 2^(b-1) instead of a learned one."""
    rank: Positive = 64
    """Rank r of the adapters A (in x r) and B (out x r), or what sets the size of another kind of adapter."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """LoRA scaling: the adapters act as alpha / r * A B^T. Only for adapters that have it."""
    adapter: Adapter = "lora"
    """What is trained beside the codes: a tuner of PEFT, hiwi, houlsby, or none for the quantizer alone.
    docs/reference/adapters.md lists them, with what rank and alpha are for each."""
    adapter_targets: Annotated[list[str], Field(min_length=1)] = ["all"]
    """Linears that carry adapters: all, attn, ffn, names as in self_attn.q_proj, or ends of names as in q_proj.
    The others are quantized all the same."""
    adapter_options: dict[str, Any] = {}
    """More fields of the tuner's config in PEFT, as in {use_dora: true}."""
    epochs: Annotated[int, Field(ge=0)] = 20
    """Passes over the calibration windows for each block (or layer)."""
    batch_size: Positive = 1
    """Windows in a step. The learning rates are used as they are and were chosen for steps of 1 window; for b windows
    multiply both by sqrt(b), the rule for AdamW (arXiv 2205.10287)."""
    shuffle: bool = False
    """Take the windows in another random order in every pass; Table A.1 keeps one order."""
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
    lr_adapter: Rate = 0.0005
    """Learning rate of A and B, or of the parameters of another adapter."""
    decay_adapter: Decay = 0.1
    """AdamW weight decay of A and B. Biases, and scales that do nothing at 1, are spared."""
    second_term: bool = True
    """Add the second loss term of the authors' code, which is not in the paper (apiq-bw only):
    the full-precision block on the quantized input is a second target."""
    dtype: DType = "auto"
    """Arithmetic of the solver: auto is bfloat16 autocast on a GPU and float32 on a CPU."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    activations: Literal["auto", "device", "memory", "disk"] = "auto"
    """Where the inputs and targets of a block are kept: on the device, in memory (pinned) or in files in the work
    folder; auto takes the first in which they fill at most half of what is free."""
    seed: Seed = 0
    """Seed of the initial A and of every random choice."""

    @model_validator(mode="before")
    @classmethod
    def _usable(cls, values: Any) -> Any:
        name = values.get("adapter") if isinstance(values, Mapping) else None
        reason = REFUSED.get(name) if isinstance(name, str) else None
        require(reason is None, "adapter", name, f"another one: {reason}")
        return values

    @field_validator("adapter_targets", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """One text is a list too: attn, or q_proj,v_proj."""
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _combinations(self) -> QuantizeParams:
        require(not (self.symmetric and self.bits == 1), "bits", self.bits, "at least 2 when symmetric is true")
        require(not self.patience or self.held_out > 0, "patience", self.patience, "0 when held_out is 0")
        return self


class FinetuneParams(Section):
    """Training of A and B on the frozen packed model (Table A.4)."""

    task: Literal["lm", "instruction"] = "lm"
    """lm: language modelling on `text`; instruction: prompt and answer `pairs`, loss on the answer only."""
    text: str | None = "wikitext2"
    """Corpus for task lm: same forms as calibration.corpus."""
    pairs: str | None = None
    """A .jsonl or .parquet file (or folder) of prompts and answers for task instruction."""
    column: str = "text"
    """Column of the text."""
    join: str = "\n"
    """What stands between rows of text."""
    prompt_column: str = "prompt"
    """Column of the prompts."""
    answer_column: str = "answer"
    """Column of the answers."""
    length: Annotated[int, Field(ge=2)] = 1024
    """Longest sequence, in tokens."""
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of the windows or pairs set aside; the checkpoint with the lowest loss on them is kept."""
    epochs: Annotated[float, Field(gt=0, le=1000)] = 3.0
    """Passes over the training data."""
    batch_size: Positive = 4
    """Sequences on the device at once."""
    accumulation: Positive = 16
    """Batches whose gradients are added before a step."""
    learning_rate: Rate = 3e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises linearly."""
    weight_decay: Decay = 0.1
    """AdamW weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients longer than this are shortened to it."""
    checkpoints: Positive = 4
    """Times that the held-out loss is measured and the state saved, spread evenly over the run."""
    activation_checkpointing: bool = False
    """Compute the activations of a block again in the backward pass: less memory, about a third more time."""
    dtype: DType = "auto"
    """Arithmetic: auto is bfloat16 on a GPU and float32 on a CPU."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    seed: Seed = 0
    """Seed of the held-out split and of the order of the data."""

    @model_validator(mode="after")
    def _data(self) -> FinetuneParams:
        require(self.task != "lm" or self.text is not None, "text", self.text, "a corpus when task is lm")
        require(
            self.task != "instruction" or self.pairs is not None, "pairs", self.pairs, "a file when task is instruction"
        )
        return self


class EvaluationText(Section):
    """A corpus on which perplexity is measured."""

    text: Annotated[str, Field(min_length=1)]
    """Same forms as calibration.corpus; the default split is the one that papers report."""
    column: str = "text"
    """Column of the text."""
    join: str = "\n"
    """What stands between rows (the paper's WikiText-2 uses a blank line)."""
    windows: Annotated[int, Field(ge=0)] = 0
    """First so many non-overlapping windows; 0 for all."""
    length: Annotated[int, Field(ge=2)] = 2048
    """Tokens in a window."""


class EvaluateParams(Section):
    """What the full-precision, the quantized and the finetuned model are measured on."""

    perplexity: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], EvaluationText] = Field(
        default_factory=lambda: {"wikitext2": EvaluationText(text="wikitext2", join="\n\n")}
    )
    """Corpora by the name that they carry in the tables."""
    rtn: bool = True
    """Measure the model rounded to nearest on the same grid too: what the method has to regain."""
    tasks: list[str] = []
    """Names of lm-eval tasks, built in or described by the YAML files of task_folder."""
    task_folder: str | None = None
    """Folder with lm-eval task descriptions of your own."""
    limit: Annotated[int, Field(ge=0)] = 0
    """First so many documents of each task; 0 for all."""
    batch_size: Positive = 8
    """Sequences on the device at once."""
    dtype: DType = "auto"
    """Arithmetic: auto is bfloat16 on a GPU and float32 on a CPU."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


class ReportParams(Section):
    """What the report page shows."""

    title: str = "ApiQ report"
    """Heading of the page."""
    histogram_block: int = -1
    """Block whose weight, code and adapter histograms are drawn (as in Figure 5); negative counts from the last."""


class Params(Section):
    """The whole of params.yaml."""

    model: ModelParams = Field(default_factory=ModelParams)
    calibration: CalibrationParams = Field(default_factory=CalibrationParams)
    quantize: QuantizeParams = Field(default_factory=QuantizeParams)
    finetune: FinetuneParams = Field(default_factory=FinetuneParams)
    evaluate: EvaluateParams = Field(default_factory=EvaluateParams)
    report: ReportParams = Field(default_factory=ReportParams)


def parse(values: Mapping[str, Any]) -> Params:
    """Validate the content of params.yaml.

    Raises:
        ApiqError: a key is unknown or a value is not allowed; one sentence with key, value and what is allowed.
    """
    try:
        return Params.model_validate(values)
    except ValidationError as refusal:
        raise ApiqError(sentence(refusal, Params)) from None
