"""The table of methods: one file each, one interface (`apiq.blocks.problem.Method`)."""

from __future__ import annotations

from apiq.blocks.problem import Method
from apiq.methods.apiq_bw import ApiqBlockwise
from apiq.methods.apiq_lw import ApiqLayerwise
from apiq.methods.awq import Awq
from apiq.methods.budgeted import Budgeted
from apiq.methods.closed_form import ClosedForm
from apiq.methods.gptq import Gptq
from apiq.methods.gptq_lora import GptqLora
from apiq.methods.loftq import Loftq
from apiq.methods.lq_lora import LqLora
from apiq.methods.omniquant import Omniquant
from apiq.methods.qlora import Qlora
from apiq.methods.rtn import RoundToNearest
from apiq.params import QuantizeParams

METHODS = {
    "rtn": RoundToNearest,
    "gptq": Gptq,
    "awq": Awq,
    "omniquant": Omniquant,
    "qlora": Qlora,
    "gptq-lora": GptqLora,
    "loftq": Loftq,
    "lq-lora": LqLora,
    "closed-form": ClosedForm,
    "apiq-lw": ApiqLayerwise,
    "apiq-bw": ApiqBlockwise,
}


def build(params: QuantizeParams) -> Method:
    """The method that `params` names, with its parameters; on a grid for each linear under a target of bits."""
    method = METHODS[params.method](params)
    return method if params.target_bits is None else Budgeted(method, params)
