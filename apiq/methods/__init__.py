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
    """The method that `params` names, with its parameters; under a budget where linears get a grid or a rank each."""
    method = METHODS[params.method](params)
    return Budgeted(method, params) if params.divided else method
