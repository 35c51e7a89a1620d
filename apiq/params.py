"""The parameters of every stage, validated as a whole.

One model per section of `params.yaml`; the docstring under a field is its documentation and its
unit. The defaults are the settings of the ApiQ paper (arXiv 2402.05147, Tables A.1, A.2 and A.4)
for 2-bit Llama-2-7B. `parse` refuses what cannot be run in one sentence that names the key, the
value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from apiq.errors import ApiqError
from apiq.quantize_params import QuantizeParams
from apiq.refine_params import RefineParams
from apiq.refusals import require, sentence
from apiq.section import Decay, Device, DType, Positive, Rate, Section, Seed


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
    mixture: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """More corpora, in the same forms. The windows are drawn from `corpus` and these in equal parts, so one that is
    named twice gives twice as many."""
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

    @model_validator(mode="after")
    def _enough(self) -> CalibrationParams:
        corpora = 1 + len(self.mixture)
        require(self.windows >= corpora, "windows", self.windows, f"at least {corpora}, one of each corpus")
        return self


class FinetuneParams(Section):
    """Training of A and B on the frozen packed model (Table A.4)."""

    task: Literal["lm", "instruction", "none"] = "lm"
    """lm: language modelling on `text`; instruction: prompt and answer `pairs`, loss on the answer only; none: the
    quantized model is measured as it is, as methods without adapters need it."""
    text: Annotated[str, Field(min_length=1)] | None = "wikitext2"
    """Corpus for task lm: same forms as calibration.corpus."""
    pairs: Annotated[str, Field(min_length=1)] | None = None
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
    packing: bool = False
    """Several short examples in one sequence of at most `length` tokens, none of which attends to another."""
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of the windows or pairs set aside; the checkpoint with the lowest loss on them is kept."""
    epochs: Annotated[float, Field(gt=0, le=1000)] = 3.0
    """Passes over the training data."""
    batch_size: Positive = 4
    """Sequences on the device at once."""
    accumulation: Positive = 16
    """Batches whose gradients are added before a step."""
    pooled: bool = False
    """Keep A constant within the groups of the grid (QA-LoRA, arXiv 2309.14717), so that `apiq merge --into zeros` is
    exact. Adapters that were not quantized with quantize.pooled lose most of what was fitted at the start."""
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = "adamw"
    """AdamW with moments in float32, or in 8 bits by bitsandbytes; paged moves them to RAM when the GPU is full."""
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
    tracking: Literal["none", "tensorboard", "dvclive"] = "none"
    """Who besides log.csv gets losses and learning rates, in the folder tracking/ beside the output."""
    dtype: DType = "auto"
    """Arithmetic: auto is bfloat16 on a GPU that multiplies it itself, else float32."""
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
        alike = not self.pooled or self.optimizer == "adamw"
        reason = "moments in 8 bits are not alike within a group"
        require(alike, "optimizer", self.optimizer, f"adamw when pooled is true: {reason}")
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
    errors: bool = True
    """Measure the errors of weights and activations, linear by linear (Figures 3 and 4 of the paper)."""
    error_windows: Positive = 32
    """Windows of the first corpus of perplexity on which activations are compared; no method was fitted on them."""
    tasks: list[str] = Field(default_factory=list)
    """Names of lm-eval tasks, built in or described by the YAML files of task_folder."""
    task_folder: str | None = None
    """Folder with lm-eval task descriptions of your own."""
    limit: Annotated[int, Field(ge=0)] = 0
    """First so many documents of each task; 0 for all."""
    batch_size: Positive = 8
    """Sequences on the device at once."""
    dtype: DType = "auto"
    """Arithmetic: auto is bfloat16 on a GPU that multiplies it itself, else float32."""
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
    refine: RefineParams = Field(default_factory=RefineParams)
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
