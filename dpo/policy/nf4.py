"""QLoRA (2305.14314): weights that are not trained are held in 4 bits, those of NF4, by bitsandbytes.

A layer computes with the float32 weights that its bits stand for, which it makes anew at each pass. So a quantized
model is the model of these weights, in less memory: log-probs, gradients, fingerprint and what is saved are its own.
"""

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo.policy import lora


class Linear4bit(nn.Linear):
    """A linear layer whose weight is never trained.

    Not the layer of bitsandbytes, which computes in the dtype of its first input ever, and in evaluation mode, on some
    CPUs, by a bfloat16 kernel: a reference would not be the policy that it is at first.
    """

    def __init__(self, layer: nn.Linear, bits: Tensor, state: QuantState) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias, self.state = nn.Parameter(bits, requires_grad=False), layer.bias, state

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        made: Tensor = matmul_4bit(input.to(dtype), self.weight, bias=bias, quant_state=self.state)
        return made

    def whole_weight(self) -> Tensor:
        """What the bits stand for.  # (outputs, inputs) float32"""
        made: Tensor = dequantize_4bit(self.weight, self.state)
        return made

    def _apply(self, fn, recurse: bool = True) -> "Linear4bit":  # type: ignore[no-untyped-def]  # noqa: ANN001
        super()._apply(fn, recurse)
        self.state.to(self.weight.device)
        return self


@torch.no_grad()
def quantize(model: PreTrainedModel, double: bool) -> dict[str, Tensor]:
    """Round the linear weights of a model, in place, to what 4 bits stand for; those bits, by name, for `hold`.

    double: the scales of the blocks are quantized, too, to 8 bits.
    """
    found: dict[str, Tensor] = {}
    for name in lora.linear(model):
        weight = model.get_parameter(f"{name}.weight")
        bits, state = quantize_4bit(weight, blocksize=lora.BLOCK, compress_statistics=double, quant_type="nf4")
        weight.copy_(dequantize_4bit(bits, state))
        found[f"{name}.weight"] = bits
        found |= {f"{name}.weight.{key}": one.contiguous() for key, one in state.as_dict(packed=True).items()}
    return found


def hold(model: PreTrainedModel, stored: dict[str, Tensor]) -> None:
    """Put layers of 4 bits in the places of a model's linear ones. stored: of `quantize`; it is emptied."""
    for name in lora.linear(model):
        bits, prefix = stored.pop(f"{name}.weight"), f"{name}.weight."
        parts = {key.removeprefix(prefix): stored.pop(key) for key in [*stored] if key.startswith(prefix)}
        state = QuantState.from_dict(parts, bits.device)
        model.set_submodule(name, Linear4bit(model.get_submodule(name), bits, state))  # type: ignore[arg-type]
