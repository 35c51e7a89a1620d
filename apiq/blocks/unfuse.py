"""Every weight that is to be quantized as an nn.Linear of its own: GPT-2's Conv1D, and experts stored in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from apiq.blocks.architecture import replace
from apiq.errors import ApiqError


def unfuse(block: nn.Module) -> nn.Module:
    """Rewrite `block` in place so that its weights are nn.Linear; it computes what it computed before.

    The linears are views of the tensors that were there; on the meta device they have shapes only.

    Raises:
        ApiqError: the experts of the block are laid out in a way that is not known here.
    """
    for name, module in list(block.named_modules()):
        if isinstance(module, Conv1D):
            replace(block, name, linear_of(module.weight.detach().t(), module.bias))
        elif _is_fused(module):
            replace(block, name, Experts(module))
    return block


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """An nn.Linear with this very weight (out, in) and bias (out)."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


class Expert(nn.Module):
    """One expert: down(gate(gate_up(x))), where `gate` multiplies one half by the activation of the other."""

    def __init__(self, gate_up_proj: nn.Linear, down_proj: nn.Linear):
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj


class Experts(nn.ModuleList):
    """The experts of a mixture, one module each, in the place of a transformers module that holds them fused."""

    _gate: Callable[[Tensor], Tensor]

    def __init__(self, fused: nn.Module):
        biased = bool(getattr(fused, "has_bias", False))
        super().__init__(
            Expert(
                linear_of(_matrix(fused, "gate_up_proj", e), _bias(fused, "gate_up_proj", e) if biased else None),
                linear_of(_matrix(fused, "down_proj", e), _bias(fused, "down_proj", e) if biased else None),
            )
            for e in range(fused.gate_up_proj.shape[0])  # type: ignore[union-attr]
        )
        fused._parameters.clear()
        object.__setattr__(self, "_gate", fused._apply_gate)  # no submodule: it has nothing left but its gate

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum over the chosen experts of weight times output, for tokens (n, width), (n, k), (n, k)."""
        result = torch.zeros_like(hidden_states)
        for number, token, place in self._chosen(top_k_index):
            expert: Expert = self[number]  # type: ignore[assignment]
            output = expert.down_proj(self._gate(expert.gate_up_proj(hidden_states[token])))
            result.index_add_(0, token, (output * top_k_weights[token, place, None]).to(result.dtype))
        return result

    def _chosen(self, top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The experts with their tokens, which keep their order, and with the place of each among a token's choices."""
        for number in top_k_index.unique().tolist():
            if number < len(self):  # transformers marks tokens of experts that are elsewhere by their count
                token, place = torch.where(top_k_index == number)
                yield number, token, place


def _is_fused(module: nn.Module) -> bool:
    held = module._parameters
    if not all(isinstance(held.get(name), Tensor) and held[name].dim() == 3 for name in ("gate_up_proj", "down_proj")):  # type: ignore[union-attr]
        return False
    unknown = [name for name in ("has_post_expert_norm",) if getattr(module, name, False)]
    if unknown or not getattr(module, "has_gate", True) or not hasattr(module, "_apply_gate"):
        raise ApiqError(
            f"the experts in {type(module).__name__} are laid out in a way that apiq does not know "
            f"({', '.join(unknown) or 'no gate'}); this model cannot be quantized yet."
        )
    return True


def _matrix(fused: nn.Module, name: str, expert: int) -> Tensor:
    weight = fused._parameters[name][expert].detach()  # type: ignore[index]
    return weight.t() if getattr(fused, "is_transposed", False) else weight


def _bias(fused: nn.Module, name: str, expert: int) -> Tensor:
    return fused._parameters[f"{name}_bias"][expert]  # type: ignore[index]
