"""Execute a run on a device that refuses what a GPU refuses, on a machine without one.

    python -m tests.other_device RUN        # a run's directory with its config.yaml; one process

Its tensors compute on the CPU, but say that they lie on `other`: an operation on tensors of both raises, as does a view
of one as an array of NumPy, and autocast has the lists of CUDA. Attention goes as on CUDA, by block masks, with a dense
kernel in place of FlexAttention. It shows what was left on the CPU, not what a GPU computes, nor how fast.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel

from dpo.policy import attention
from dpo.sweep.execute import begin
from dpo.training import distributed

NAME = "other"
CREATED = {torch.tensor, torch.as_tensor, torch.arange}  # which torch cannot create on a device made in Python
COPIES = ("_to_copy", "copy_")
INDICES = dict.fromkeys(("index", "index_put", "index_put_", "_index_put_impl_"), 1)  # their place
CASTS = {  # by CUDA's autocast
    "low": ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "scaled_dot_product_attention"),
    "high": ("exp", "expm1", "log", "log1p", "reciprocal", "rsqrt", "softplus", "logsumexp", "layer_norm", "nll_loss"),
    "to": ("softmax.int", "log_softmax.int", "cumsum", "cumprod", "sum", "sum.dim_IntList"),
}
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


class Module:
    """What torch asks of `torch.other`."""

    is_available = is_initialized = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


class There(Tensor):
    """A tensor that says it lies on the other device; `here` has its values."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        place = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, here.shape, **place, dtype=here.dtype, device=f"{NAME}:0")
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, *args, **(kwargs or {}))

    def tolist(self) -> Any:
        return self.here.detach().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"NumPy has no view of a tensor on {NAME}; copy it to the CPU")

    __array__ = numpy


class Created(TorchFunctionMode):
    """Inside, what `CREATED` creates on the device is copied there."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in CREATED and str(kwargs.get("device")).startswith(NAME):
            return function(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        return function(*args, **kwargs)


def compute(function: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on the values, if its tensors are on one device, but for single numbers and for indices."""
    name = function.__name__.partition(".")[0]
    beside = INDICES.get(name) if isinstance(args[0], There) else None  # which a GPU takes from the CPU, too
    together = [one for place, one in enumerate(args) if place != beside]
    tensors = [one for one in tree_leaves((together, kwargs)) if isinstance(one, Tensor)]
    there = {id(one.here): one for one in tree_leaves((args, kwargs)) if isinstance(one, There)}
    if there and name not in COPIES and any(not isinstance(one, There) and one.dim() for one in tensors):
        shapes = [(str(one.device), tuple(one.shape)) for one in tensors]
        raise RuntimeError(f"{function} must have all tensors on one device, found {shapes}")
    device = kwargs.get("device")
    here = device is not None and torch.device(device).type != NAME
    if device is not None and not here:
        kwargs["device"] = "cpu"
    result = function(*tree_map(_values, args), **tree_map(_values, kwargs))
    if here or not (there or device is not None):
        return result
    return tree_map(lambda one: there.get(id(one), There(one)) if isinstance(one, Tensor) else one, result)


def _values(one: Any) -> Any:
    return one.here if isinstance(one, There) else one


def cast(name: str, how: str) -> Any:
    """An operation under autocast."""
    base, _, overload = name.partition(".")
    function = getattr(getattr(torch.ops.aten, base), overload or "default")
    wide = {"low": torch.bfloat16, "high": torch.float32}

    def to(one: Any) -> Any:
        floats = isinstance(one, Tensor) and one.dtype in (torch.float32, torch.bfloat16)
        return one.to(wide[how]) if floats and one.device.type == NAME else one

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            if how != "to":
                args, kwargs = tree_map(to, (args, kwargs))
            elif kwargs.get("dtype") is None and args[0].is_floating_point():
                kwargs["dtype"] = torch.promote_types(args[0].dtype, torch.float32)
            return function(*args, **kwargs)

    return run


def dense(q: Tensor, k: Tensor, v: Tensor, modified: Any, seen: BlockMask, scale: float, enable_gqa: bool) -> Tensor:
    """FlexAttention by all scores. Raises: AssertionError if a block that is seen is not among those of the mask."""
    if enable_gqa:
        k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
    places = torch.arange(q.shape[2], device=q.device)
    visible = seen.mask_mod(None, None, places[:, None], places)  # (T, T)
    size, listed = seen.BLOCK_SIZE[0], torch.zeros_like(seen.kv_indices[0, 0], dtype=torch.bool)
    partly, whole = (seen.kv_num_blocks, seen.kv_indices), (seen.full_kv_num_blocks, seen.full_kv_indices)
    for numbers, order in (partly, whole):
        for row, number in enumerate(numbers[0, 0].tolist()):
            listed[row, order[0, 0, row, :number].long()] = True
    blocks = listed.repeat_interleave(size, 0).repeat_interleave(size, 1)[: len(places), : len(places)]
    assert not (visible & ~blocks).any()
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if modified is None else modified(scores)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype) @ v


def main(run: Path) -> None:
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    of_all = torch.library.Library("_", "IMPL")
    of_all.fallback(compute, "PrivateUse1")
    of_all.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    of_some = torch.library.Library("aten", "IMPL")
    for how, names in CASTS.items():
        for name in names:
            of_some.impl(name, cast(name, how), "AutocastPrivateUse1")
    torch.__future__.set_swap_module_params_on_conversion(True)  # else tied weights part when they are moved
    save = PreTrainedModel.save_pretrained

    def saved(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:  # torch finds no storage of these tensors
        save(model, *args, **kwargs, state_dict={name: _values(one) for name, one in model.state_dict().items()})

    PreTrainedModel.save_pretrained = saved
    distributed.device = lambda name: torch.device(NAME, 0)
    attention.flex_attention = dense
    with Created(), torch.autograd.set_multithreading_enabled(False):  # torch has no thread for this device
        begin(run)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
