"""Join the process group, shard a model over it, sum and gather over ranks. All of it does nothing for one process.

What comes from all ranks is a collective: every rank must call it, and waits in it for the others.
"""

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

Model = TypeVar("Model", bound=nn.Module)
Made = TypeVar("Made")
FILE_BYTES = 4e9
TIMEOUT = timedelta(days=1)  # ranks may wait for what another run makes for both; one that dies is noticed at once
_here: torch.device | None = None  # what `join` has found


@dataclass(frozen=True)
class ParallelLayout:
    """How a model lies on the processes of a run."""

    group: int | None  # processes that hold one copy of the weights among them; None: all
    offload: bool  # weights, gradients and optimizer live in CPU memory
    precision: str  # "bf16": weights are gathered in bfloat16, too; gradients are reduced in float32 in any case


def device(name: str | torch.device) -> torch.device:
    """The device of this process: "cpu", "cuda" (that of LOCAL_RANK), or "auto": CUDA where there is any."""
    kind = str(name).partition(":")[0]
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if kind not in ("auto", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name}")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise RuntimeError(
            f"process {index} of this machine needs a CUDA device of its own, found {count}; "
            "use fewer processes or device=cpu"
        )
    return torch.device("cuda", index)


def join(name: str | torch.device) -> torch.device:
    """Join the processes that torchrun started (WORLD_SIZE > 1), once; returns this process's device."""
    global _here
    _here = local = device(name)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if local.type == "cuda" else "gloo", timeout=TIMEOUT)
    return local


def here() -> torch.device:
    """The device of this process; before it has joined, what "auto" means."""
    return device("auto") if _here is None else _here


def leave() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _mesh.cache_clear()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is rank 0, which writes for all of them; known before the group is joined, too."""
    return int(os.environ.get("RANK", "0")) == 0


def shard(model: Model, layout: ParallelLayout, device: torch.device) -> Model:
    """Shard in place with FSDP2: each of its blocks, then the rest. `device` is where its forward passes run.

    With layout.group there are copies of the weights, each sharded over a group of neighbouring ranks (HSDP). Only the
    forward of `model` itself may be called from then on.
    """
    if world_size() == 1:
        return model
    free_sharded()
    options: dict[str, Any] = {"mesh": _mesh(device.type, layout.group)}
    if layout.precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if layout.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for block in blocks(model):
        fully_shard(block, **options)
    fully_shard(model, reshard_after_forward=True, **options)  # else a forward alone leaves its parameters whole
    return model


@cache
def _mesh(kind: str, group: int | None) -> DeviceMesh:
    """How the ranks lie, once for all models: every mesh of copies makes process groups, which nothing takes back."""
    if group is not None:
        ranks = torch.arange(world_size()).view(-1, group)
        both = [dist.new_subgroups_by_enumeration(some.tolist(), TIMEOUT)[0] for some in (ranks.T, ranks)]
        return DeviceMesh.from_group(both, kind, ranks, mesh_dim_names=("copy", "part"))
    return init_device_mesh(kind, (world_size(),))


def free_sharded() -> None:
    """Give back the memory of sharded models that nobody has any more: they refer to themselves, so that Python finds
    them only when it looks for garbage, which it does for young objects alone.
    """
    if world_size() > 1:
        gc.collect()


def reshard(model: nn.Module) -> None:
    """Shard again what a forward that was broken off by an error has left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    return isinstance(next(model.parameters(), None), DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it. A collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(whole: Tensor, like: Tensor) -> Tensor:
    """What this process has of a whole tensor that lies as another one."""
    if isinstance(like, DTensor):
        whole = local(distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None))
    return whole.to(local(like).device)


def device_of(model: nn.Module) -> torch.device:
    """Where its forward passes run, wherever its weights live."""
    weight = next(model.parameters())
    if isinstance(weight, DTensor) and weight.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return weight.device


def blocks(model: nn.Module) -> list[nn.Module]:
    """A transformer's layers, of one class or several: the ModuleList with most parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=()))


def in_files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which file, counted from 1, each tensor goes in: a file is put together in memory, so its size has a limit."""
    files, file, size = {}, 1, 0
    for name, tensor in tensors.items():
        if size > 0 and size + tensor.nbytes > FILE_BYTES:
            file, size = file + 1, 0
        files[name], size = file, size + tensor.nbytes
    return files


def on_main(make: Callable[[], Made]) -> Made:
    """What rank 0 makes, on all ranks; what it raises there is raised on all. A collective."""
    if world_size() == 1:
        return make()
    outcome: list[tuple[Made | None, Exception | None]] = []
    if is_main():
        try:
            outcome = [(make(), None)]
        except Exception as error:
            outcome = [(None, error)]
    [(value, refused)] = gathered(outcome)
    if refused is not None:
        raise refused
    return cast(Made, value)


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, as a new tensor. A collective."""
    total = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def any_true(flag: bool) -> bool:
    """Whether the flag is set on any rank. A collective; with False on all ranks a barrier."""
    return bool(all_sum(torch.tensor(int(flag))))


def gathered(items: list[Any]) -> list[Any]:
    """The items of all ranks, in their order. A collective."""
    if not dist.is_initialized():
        return items
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]
