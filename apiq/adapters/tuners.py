"""The table of adapters: the PEFT config that each is, made from rank and alpha, and what the engine must know of it.

Nothing of PEFT is imported here, so that parameters can be checked without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Site:
    """What the settings of a tuner are made from."""

    rank: int
    alpha: float
    seed: int
    shapes: Mapping[str, tuple[int, int]]
    """Shape (out, in) of each linear that is to carry adapters, by its name in the block."""
    pattern: Callable[[list[str]], str]
    """The regular expression that finds the named linears."""
    down: list[str]
    """Those linears that end a feed-forward part."""

    def divisor(self, sizes: str, at_most: int, even: bool = False) -> int:
        """The largest number up to `at_most` that divides all "in" or "out" sizes, or "both"."""
        common = self.common(sizes)
        fitting = [d for d in range(1, common + 1) if common % d == 0 and not (even and d % 2)]
        return max([d for d in fitting if d <= at_most], default=min(fitting, default=1))

    def common(self, sizes: str) -> int:
        """The greatest common divisor of all "in" or "out" sizes, or of "both"."""
        chosen = {"in": slice(1, 2), "out": slice(0, 1), "both": slice(0, 2)}[sizes]
        return math.gcd(*(size for shape in self.shapes.values() for size in shape[chosen]))

    def low_rank(self) -> list[int]:
        """Parameters of a LoRA of this rank on each linear, r (in + out)."""
        return [self.rank * (o + i) for o, i in self.shapes.values()]

    def weights(self) -> list[int]:
        """Weights of each linear."""
        return [o * i for o, i in self.shapes.values()]


@dataclass(frozen=True)
class Tuner:
    """One kind of adapter."""

    config: str
    """Name of its config class in PEFT."""
    settings: Callable[[Site], Settings]
    """The fields of that config."""
    joint: bool = True
    """Codes, ranges and adapters are trained together. Where False, they take turns: first the ranges without
    adapters, then the adapters on the packed weight; the tuner passes no gradient to its base weight, or takes
    a part of itself from that weight when it is put on."""
    bounded: bool = False
    """The rank is that of a matrix of the linear's shape, so at most its smaller side."""
    moves_weight: bool = False
    """It starts by moving a part of W out of the linear, so it is put on before W is quantized."""
    shared: bool = False
    """Blocks share a part of it. That part is the same in every block and stays as it starts until finetuning."""
    numbered: str = ""
    """Parameters under this name are numbered through all linears of the model, not kept with their linear."""
    at_outputs: bool = False
    """It stands behind the attention and the feed-forward part, not on every linear."""


def _lora(**more: Any) -> Callable[[Site], Settings]:
    return lambda site: {"r": site.rank, "lora_alpha": whole(site.alpha), **more}


def whole(alpha: float) -> float:
    """Alpha as an int where it is whole."""
    return int(alpha) if float(alpha).is_integer() else alpha  # PEFT declares an int and takes both


def _rank(**more: Any) -> Callable[[Site], Settings]:
    return lambda site: {"r": site.rank, **more}


def _rank_and_alpha(**more: Any) -> Callable[[Site], Settings]:
    return lambda site: {"r": site.rank, "alpha": whole(site.alpha), **more}


def _projected(**more: Any) -> Callable[[Site], Settings]:
    return lambda site: {"r": site.rank, "projection_prng_key": site.seed % 2**32, **more}


def _adalora(site: Site) -> Settings:
    return {"init_r": site.rank, "target_r": site.rank, "lora_alpha": whole(site.alpha), "total_step": 1}


def _adamss(site: Site) -> Settings:
    return {"r": site.rank, "subspace_rank": max(1, site.rank // 5), "random_seed": site.seed % 2**32}


def _boft(site: Site) -> Settings:
    return {"boft_block_size": site.divisor("in", max(2, site.rank))}


def _c3a(site: Site) -> Settings:
    cheap = max(math.ceil(n / budget) for n, budget in zip(site.weights(), site.low_rank(), strict=True))
    common = site.common("both")
    sizes = [d for d in range(1, common + 1) if common % d == 0]
    return {"block_size": min((d for d in sizes if d >= cheap), default=common), "init_weights": True}


def _frequencies(site: Site) -> Settings:
    return {"n_frequency": min(*site.low_rank(), *site.weights()), "init_weights": True}


def _ia3(site: Site) -> Settings:
    return {"feedforward_modules": site.pattern(site.down) if site.down else []}


def _oft(site: Site) -> Settings:
    return {"oft_block_size": site.divisor("in", max(2, site.rank)), "r": 0}


def _osf(site: Site) -> Settings:
    frozen = {site.pattern([name]) + "$": max(min(shape) - site.rank, 0) for name, shape in site.shapes.items()}
    return {"rank_pattern": frozen}


def _randlora(site: Site) -> Settings:
    # Scaled as its paper advises; its bases are as large as a weight and are made again from their key
    return _projected(randlora_alpha=20 * site.rank, save_projection=False)(site)


def _road(site: Site) -> Settings:
    return {"group_size": site.divisor("out", 64, even=True)}


def _shira(site: Site) -> Settings:
    return {"r": site.rank, "random_seed": site.seed % 2**32}


def _supertuning(site: Site) -> Settings:
    return {"sparsity": max(0.5, 1 - sum(site.low_rank()) / sum(site.weights()))}


def _tinylora(site: Site) -> Settings:
    return {"r": site.rank, "projection_seed": site.seed % 2**32}


def _vblora(site: Site) -> Settings:
    return {"r": site.rank, "vector_length": site.divisor("both", 256)}


TUNERS: dict[str, Tuner] = {
    "lora": Tuner("LoraConfig", _lora(), bounded=True),
    "rslora": Tuner("LoraConfig", _lora(use_rslora=True), bounded=True),
    "dora": Tuner("LoraConfig", _lora(use_dora=True), bounded=True),
    "pissa": Tuner("LoraConfig", _lora(init_lora_weights="pissa"), bounded=True, moves_weight=True),
    "olora": Tuner("LoraConfig", _lora(init_lora_weights="olora"), bounded=True, moves_weight=True),
    "adalora": Tuner("AdaLoraConfig", _adalora, bounded=True),
    "adamss": Tuner("AdamssConfig", _adamss, joint=False, bounded=True),
    "beft": Tuner("BeftConfig", lambda site: {}),
    "boft": Tuner("BOFTConfig", _boft),
    "c3a": Tuner("C3AConfig", _c3a),
    "deft": Tuner("DeftConfig", _rank(), bounded=True),
    "delora": Tuner("DeloraConfig", _rank(delora_lambda=1.0), bounded=True),
    "fourierft": Tuner("FourierFTConfig", _frequencies),
    "gralora": Tuner("GraloraConfig", _rank_and_alpha(), bounded=True),
    "hira": Tuner("HiraConfig", _rank(), bounded=True),
    "hiwi": Tuner("PeanutConfig", _rank(depth=0, act_fn="relu")),
    "houlsby": Tuner("HoulsbyConfig", _rank(), at_outputs=True),
    "hra": Tuner("HRAConfig", _rank(), joint=False, bounded=True),
    "ia3": Tuner("IA3Config", _ia3),
    "loha": Tuner("LoHaConfig", _rank_and_alpha()),
    "lokr": Tuner("LoKrConfig", _rank_and_alpha()),
    "miss": Tuner("MissConfig", _rank(), bounded=True),
    "oft": Tuner("OFTConfig", _oft),
    "osf": Tuner("OSFConfig", _osf, joint=False, bounded=True),
    "peanut": Tuner("PeanutConfig", _rank()),
    "psoft": Tuner("PsoftConfig", lambda site: {"r": site.rank, "psoft_alpha": site.rank}, joint=False, bounded=True),
    "pvera": Tuner("PveraConfig", _projected(), shared=True),
    "randlora": Tuner("RandLoraConfig", _randlora, shared=True),
    "road": Tuner("RoadConfig", _road),
    "shira": Tuner("ShiraConfig", _shira, joint=False),
    "supertuning": Tuner("SupertuningConfig", _supertuning),
    "tinylora": Tuner("TinyLoraConfig", _tinylora, bounded=True, numbered="base_model.tinylora_v."),
    "vblora": Tuner("VBLoRAConfig", _vblora, shared=True),
    "vera": Tuner("VeraConfig", _projected(), shared=True),
    "waveft": Tuner("WaveFTConfig", _frequencies),
}
"""Adapters by the name that `quantize.adapter` gives them."""

REFUSED = {
    "adaption_prompt": "it puts prompts into attention layers of one class and nothing on linears",
    "frod": "its basis is one decomposition of the weights of all blocks, which are quantized one after another",
    "glora": "PEFT's GLoRA takes a plain nn.Linear and refuses a quantized one",
    "lily": "its matrices B are trained by all blocks together, and blocks are fitted one after another",
    "ln_tuning": "it tunes norms and nothing of the linears that are quantized",
    "poly": "its layers ask for the number of a task in every forward pass, which a block does not get",
    "shadow": "it is a second model beside the whole model, not an adapter of a block",
    "trainable_tokens": "it tunes rows of the embedding and nothing of the linears that are quantized",
    "unilora": "all it trains is one vector of all blocks together, and blocks are fitted one after another",
    "xlora": "it mixes adapters that were trained before, none of which is there yet",
}
"""What PEFT has and the block-wise fit cannot use, with the reason."""
