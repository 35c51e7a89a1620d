"""The pass back through a model that is never in memory as a whole: gradients of its loss in every linear.

    forward:   X_0 .. X_L, the inputs of the blocks and of the head, are kept            (L + 1 sets of activations)
    head:      G_L = d loss / d X_L                                                      (one more)
    backward:  for block L-1 .. 0:  dW, G_l = gradients of <block(X_l), G_{l+1}> in its weights and in X_l

One block is in memory at a time; each is read twice. The loss of a window is - log p of its tokens, summed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apiq import parallel
from apiq.blocks.activations import Activations, batches, choose_home
from apiq.blocks.architecture import linears
from apiq.blocks.capture import PADDING, completed
from apiq.blocks.survey import Whole
from apiq.blocks.unfuse import unfuse
from apiq.errors import ApiqError


def squared_gradients(whole: Whole) -> Iterator[tuple[int, nn.Module, dict[str, Tensor]]]:
    """The mean over the windows of (d log p(window) / d W)^2 for the linears of each block, the last block first.

    This is the diagonal of the empirical Fisher information, float32 (out, in); 0 for a linear that no token reaches.

    Raises:
        ApiqError: the model does not predict the next token, or a gradient is not finite.
    """
    if not whole.stream.model.can_generate():
        raise ApiqError(
            f"{type(whole.stream.model).__name__} does not predict the next token, so it has no loss on calibration "
            "windows to take gradients of: set quantize.sensitivity, or quantize.lq_lora.weights, to none."
        )
    inputs = _forward(whole)
    gradient = _head(whole, inputs.pop())
    for index in reversed(range(len(whole.calls))):
        block = unfuse(whole.stream.load_block(index, whole.device)).requires_grad_(False)
        whole.report("gradients", len(whole.calls) - 1 - index)
        yield index, block, _through(whole, index, block, inputs.pop(), gradient)


def _forward(whole: Whole) -> list[Activations]:
    """The input of every block, and of what follows the last, each at the home that has room for all of them."""
    X, count = whole.X, len(whole.calls)
    assert X is not None
    home = choose_home(whole.wanted_home, tuple(X.rows.shape), X.rows.dtype, count + 2, whole.device, whole.folder)
    kept = [X.moved(home)]
    for index, call in enumerate(whole.calls):
        block = unfuse(whole.stream.load_block(index, whole.device))
        whole.report("forward", index)

        def run(hidden: Tensor, batch: slice, block: nn.Module = block, call=call) -> Tensor:
            with whole.precision():
                return call.run(block, hidden, batch)

        kept.append(kept[-1].mapped(run))
    return kept


def _head(whole: Whole, last: Activations) -> Activations:
    """The gradient of the loss in the hidden states after the last block; takes the place of `last`."""
    assert whole.windows is not None
    with whole.stream.rest(whole.device) as model:
        for batch in batches(len(last), 1):
            hidden, window = last[batch].requires_grad_(), whole.windows[batch].to(whole.device)
            with torch.enable_grad(), whole.precision():
                logits = completed(model, whole.stream.blocks.modules, window.clamp(min=0), hidden)
                loss = F.cross_entropy(logits[0, :-1].float(), window[0, 1:], ignore_index=PADDING, reduction="sum")
            last[batch] = torch.autograd.grad(loss, hidden)[0]
    return last


def _through(whole: Whole, index: int, block: nn.Module, X: Activations, gradient: Activations) -> dict[str, Tensor]:
    """The squared gradients of the block's linears; `gradient`, that of its output, becomes that of its input."""
    found, call = linears(block), whole.calls[index]
    weights = [linear.weight.requires_grad_(True) for linear in found.values()]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for batch in batches(len(X), 1):
        hidden = X[batch].requires_grad_()
        with torch.enable_grad(), whole.precision():
            output = call.run(block, hidden, batch)
        own, *others = torch.autograd.grad(
            output, [hidden, *weights], gradient[batch].to(output.dtype), allow_unused=True
        )
        gradient[batch] = own
        for total, other in zip(sums, others, strict=True):
            if other is not None:
                total.add_(other.float().square_())
    block.requires_grad_(False)
    count = parallel.add(torch.tensor(float(len(X)), device=whole.device))
    squares = {name: parallel.add(total) / count for name, total in zip(found, sums, strict=True)}
    for name, square in squares.items():
        if not bool(square.isfinite().all()):
            raise ApiqError(
                f"the gradient of the loss in linear {name} of block {index} is not finite; "
                "set quantize.dtype to float32."
            )
    return squares
