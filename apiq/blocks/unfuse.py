"""Every weight that is to be quantized as an nn.Linear of its own: GPT-2's Conv1D, and experts stored in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from apiq.blocks.architecture import replace
from apiq.errors import ApiqError

LEFT_OUT = 0.1
"""The largest share of a block that may stay at full precision: what a recurrence decays by, say."""


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
    """One expert: down(gate(up(x))); after a gate_up_proj `gate` multiplies one half by the activation of the other."""

    def __init__(self, up: str, first: nn.Linear, last: nn.Linear):
        super().__init__()
        self.add_module(up, first)
        self.down_proj = last

    def forward(self, hidden_states: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """The output (n, width) for tokens (n, width)."""
        first, last = self.children()
        return last(gate(first(hidden_states)))


class Experts(nn.ModuleList):
    """The experts of a mixture, one module each, in the place of a transformers module that holds them fused."""

    _gate: Callable[[Tensor], Tensor]

    def __init__(self, fused: nn.Module):
        gated = "gate_up_proj" in fused._parameters
        up = "gate_up_proj" if gated else "up_proj"
        count = len(fused._parameters[up])  # type: ignore[arg-type]
        super().__init__(Expert(up, _linear(fused, up, e), _linear(fused, "down_proj", e)) for e in range(count))
        fused._parameters.clear()
        gate = fused._apply_gate if gated else fused.act_fn
        object.__setattr__(self, "_gate", gate)  # no submodule: it has nothing left but its gate

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum over the chosen experts of weight times output, for tokens (n, width), (n, k), (n, k)."""
        result = torch.zeros_like(hidden_states)
        for number, token, place in self._chosen(top_k_index):
            output = self[number](hidden_states[token], self._gate)
            result.index_add_(0, token, (output * top_k_weights[token, place, None]).to(result.dtype))
        return result

    def _chosen(self, top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The experts with their tokens, which keep their order, and with the place of each among a token's choices."""
        for number in top_k_index.unique().tolist():
            if number < len(self):  # transformers marks tokens of experts that are elsewhere by their count
                token, place = torch.where(top_k_index == number)
                yield number, token, place


def _is_fused(module: nn.Module) -> bool:
    held = {name for name, value in module._parameters.items() if isinstance(value, Tensor) and value.dim() == 3}
    if not held >= {"down_proj"} or held.isdisjoint(("gate_up_proj", "up_proj")):
        return False
    wanted = "_apply_gate" if "gate_up_proj" in held else "act_fn"
    unknown = [name for name in ("has_post_expert_norm",) if getattr(module, name, False)]
    unknown += [] if hasattr(module, wanted) else [f"no {wanted}"]
    if unknown:
        raise ApiqError(
            f"the experts in {type(module).__name__} are laid out in a way that apiq does not know "
            f"({', '.join(unknown)}); this model cannot be quantized yet."
        )
    return True


def _linear(fused: nn.Module, name: str, expert: int) -> nn.Linear:
    weight = fused._parameters[name][expert].detach()  # type: ignore[index]
    bias = fused._parameters[f"{name}_bias"][expert] if getattr(fused, "has_bias", False) else None  # type: ignore[index]
    return linear_of(weight.t() if getattr(fused, "is_transposed", False) else weight, bias)


def require_covered(block: nn.Module, name: str) -> None:
    """Refuse a block of which more than a share of LEFT_OUT lies in tensors that are no linears.

    Raises:
        ApiqError: experts, say, are stacked in a way that `unfuse` does not know; names the tensors.
    """
    known = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
    owners = {child: module for child, module in block.named_modules() if not isinstance(module, known)}
    left = {
        f"{child}.{key}".lstrip("."): value
        for child, module in owners.items()
        for key, value in module.named_parameters(recurse=False)
        if value.dim() > 1
    }
    share = sum(v.numel() for v in left.values()) / max(sum(p.numel() for p in block.parameters() if p.dim() > 1), 1)
    if share > LEFT_OUT:
        told = ", ".join(f"{key} {tuple(value.shape)}" for key, value in left.items())
        raise ApiqError(
            f"{share:.0%} of the weights of {name} lie in tensors that are no linears, {told}, and would stay at full "
            "precision; this model cannot be quantized yet."
        )
