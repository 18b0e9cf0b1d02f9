"""The loop: accumulate, clip, step, log, evaluate, save, stop on a signal, resume."""

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dpo.training.checkpoint import Checkpoints, get_rng, set_rng
from dpo.training.distributed import all_sum, any_true, device_of, free_sharded, gathered, is_main, world_size
from dpo.training.log import Log, progress

logger = logging.getLogger(__name__)


class Batch(Protocol):
    """A micro-batch of B items."""

    @property
    def index(self) -> Tensor: ...  # (B,) int64, row of the item in its dataset
    @property
    def valid(self) -> Tensor: ...  # (B,) bool, False for a filler
    def to(self, device: torch.device) -> Self: ...


AnyBatch = TypeVar("AnyBatch", bound=Batch)
ReadBatch = TypeVar("ReadBatch", bound=Batch, covariant=True)


class Batches(Protocol[ReadBatch]):
    """Micro-batches of each optimizer step: as many on every rank."""

    def __len__(self) -> int: ...  # optimizer steps of an epoch
    def at(self, step: int) -> tuple[Sequence[ReadBatch], int]: ...  # and the real items of all ranks
    def name(self, row: int) -> str: ...  # what to call an item in messages


Step = Callable[[AnyBatch], tuple[Tensor, dict[str, Tensor]]]  # losses (B,) and metrics (B,) of a micro-batch


@dataclass(frozen=True)
class WholeStep(Generic[AnyBatch]):
    """A step whose losses see all N items of the optimizer step at once, whatever its micro-batches and processes.

    values: all that losses read of the items of a micro-batch, name -> (B,).
    outputs: those of them that gradients flow into, a second time.
    losses: values of all items, in the order of their rows, to losses (N,) and metrics (N,). Called once a step.
    """

    values: Callable[[AnyBatch], dict[str, Tensor]]
    outputs: Callable[[AnyBatch], dict[str, Tensor]]
    losses: Callable[[dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


AnyStep = Step[AnyBatch] | WholeStep[AnyBatch]


class Stopped(KeyboardInterrupt):
    """Training ended early on a signal, after it saved a checkpoint."""


def fit(
    model: nn.Module,
    batches: Batches[AnyBatch],
    step: AnyStep[AnyBatch],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    steps: int,
    max_grad_norm: float,
    precision: str,
    log: Log,
    directory: str | Path,
    checkpoint_every: int = 0,
    checkpoints_kept: int = 1,
    evaluate: Callable[[int], None] | None = None,
    evaluate_every: int = 0,
    extra: nn.Module | None = None,
    inputs: Mapping[str, str] | None = None,
    name: str = "training",
) -> None:
    """Train `model` for `steps` optimizer steps, from the latest checkpoint in `directory` if there is one.

    model: on its device, sharded by `shard` when there are several processes, in the mode to train in.
    step: losses (B,) and metrics (B,) of a micro-batch, or a `WholeStep`. The objective is the mean loss over all real
        items of the optimizer step, whatever the size of micro-batches or the number of processes.
    precision: "fp32", or "bf16": autocast of `step`; weights, gradients and moments are float32 in both.
    evaluate: called with the steps done: 0, every `evaluate_every`, and `steps`. It changes no training.
    checkpoint_every: optimizer steps between checkpoints; 0: only when stopped. One more is saved at the end in any
        case: what comes after training can be stopped, too.
    checkpoints_kept: the newest so many stay.
    extra: a module with state of its own that belongs in the checkpoint.
    inputs: what training depends on, as digests; a checkpoint with other inputs is refused.
    """
    device, directory = device_of(model), Path(directory)
    products = autocast(precision, device)
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be above 0 (.inf: no clipping), got {max_grad_norm}")
    free_sharded()  # the references that were scored, say
    checkpoints = Checkpoints(directory, model, optimizer, scheduler, extra=extra, inputs=inputs, keep=checkpoints_kept)
    saved, evaluated = checkpoints.restore()
    done = saved
    log.epoch_steps = len(batches)
    log.rewind(done or -1, evaluated)
    if done:
        logger.info(f"{name}: resumes at step {done} of {steps}")

    def due(every: int) -> bool:
        return done == steps or (every > 0 and done % every == 0)

    bar = progress(total=steps, name=name, first=done)
    with _signals() as received, bar, checkpoints:
        while True:
            stop = any_true(bool(received) or checkpoints.failed)
            if evaluate and not (evaluated or stop) and (done == 0 or due(evaluate_every)):
                with _undisturbed(model):
                    evaluate(done)
                evaluated = True
            stop = stop or (done == steps and any_true(bool(received)))  # during the last evaluation
            if done > saved and (stop or due(checkpoint_every)):
                checkpoints.save(done, evaluated)
                saved = done
            if stop or done >= steps:
                checkpoints.finish()
            if stop:
                raise Stopped(f"{name} stopped at step {done} of {steps}; the same command resumes there")
            if done >= steps:
                return

            began, lr = time.perf_counter(), float(scheduler.get_last_lr()[0])
            micro_batches, total = batches.at(done)
            optimizer.zero_grad()
            metrics, seen = _backward(step, micro_batches, total, device, products)
            metrics["grad_norm"] = _clip(model, max_grad_norm)
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
                _refuse(done + 1, metrics, seen, batches.name)
            optimizer.step()
            scheduler.step()
            done, evaluated = done + 1, False
            metrics |= {"lr": lr, "items_per_second": total / (time.perf_counter() - began)}
            log.write(done, "train", metrics)
            bar.set_postfix(loss=metrics["loss"], refresh=False)
            bar.update()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16 for "bf16", float32 for "fp32"; weights are float32 in both."""
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision}")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _backward(
    step: AnyStep[AnyBatch],
    micro_batches: Sequence[AnyBatch],
    total: int,
    device: torch.device,
    products: torch.autocast,
) -> tuple[dict[str, float], list[tuple[Tensor, Tensor]]]:
    """Accumulate the gradient of the mean loss over the `total` real items of all ranks.

    Returns the means of loss and metrics, equal on all ranks, and this rank's (rows, losses) by micro-batch.
    """
    sums: dict[str, Tensor] = {}
    seen = []
    for batch, losses, metrics, objective in passes(step, micro_batches, total, device, products):
        objective.backward()
        seen.append((batch.index[batch.valid], losses.detach()[batch.valid]))
        for key, values in {"loss": losses, **metrics}.items():
            sums[key] = sums.get(key, 0) + (values.detach().double() * batch.valid).sum()
    means = (all_sum(torch.stack([*sums.values()])) / total).tolist()
    return dict(zip(sums, means, strict=True)), seen


def passes(
    step: AnyStep[AnyBatch],
    micro_batches: Sequence[AnyBatch],
    total: int,
    device: torch.device,
    products: contextlib.AbstractContextManager[Any],
) -> Iterator[tuple[AnyBatch, Tensor, dict[str, Tensor], Tensor]]:
    """Each micro-batch of an optimizer step, with its losses (B,), metrics (B,), and what to back-propagate for it, ().

    That adds up to the gradient of the mean loss over the `total` real items of all ranks. For a `WholeStep` this is
    gradient caching (2101.06983): of an objective f(v_1, ..., v_N) of values v_i of weights w,
    df/dw = sum_i (df/dv_i) dv_i/dw. Pass 1 computes v_i without gradients, and f with all df/dv_i from them; pass 2
    back-propagates sum_i v_i df/dv_i, a micro-batch at a time. One micro-batch of one process needs no second pass.
    """
    if not isinstance(step, WholeStep):
        for batch in (batch.to(device) for batch in micro_batches):
            with products:
                losses, metrics = step(batch)  # (B,), name -> (B,)
            # FSDP averages gradients over ranks: times world_size it adds them up, as the mean over `total` asks.
            yield batch, losses, metrics, world_size() * (losses * batch.valid).sum() / total
        return
    training, rng, parts = torch.is_grad_enabled(), get_rng(), []
    two_passes = training and world_size() * len(micro_batches) > 1
    for batch in (batch.to(device) for batch in micro_batches):
        with torch.set_grad_enabled(training and not two_passes), products:
            values = {"index": batch.index, **step.values(batch)}
        parts.append({name: value[batch.valid].cpu() for name, value in values.items()})
    parts = gathered(parts) if world_size() > 1 else parts  # which keeps no graph
    rows, order = torch.cat([part.pop("index") for part in parts]).sort()
    whole = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}  # (N,) each, on the CPU
    inputs = {name: value.requires_grad_(training) for name, value in whole.items() if value.is_floating_point()}
    losses, metrics = step.losses(whole)  # (N,), name -> (N,)
    objective = world_size() * losses.sum() / total
    if two_passes:
        gradients = torch.autograd.grad(objective, [*inputs.values()], materialize_grads=True)  # (N,) each
        set_rng(rng)  # what pass 1 dropped out, pass 2 does
    at_fault = ~losses.isfinite() & ~torch.stack([*inputs.values()]).isfinite().all(0)
    if at_fault.any():
        losses = losses.where(at_fault, 0.0)  # those of the others are not finite because of these
    for batch in (batch.to(device) for batch in micro_batches):
        index = torch.searchsorted(rows, batch.index.cpu())  # (B,); a filler repeats an item of the step
        own_metrics = {name: value[index].to(device) for name, value in metrics.items()}
        if two_passes:
            with products:
                outputs = step.outputs(batch)
            slopes = {name: gradient[index].to(device) for name, gradient in zip(inputs, gradients, strict=True)}
            objective = torch.stack([value * slopes[name] * batch.valid for name, value in outputs.items()]).sum()
        yield batch, losses[index].to(device), own_metrics, objective


def _clip(model: nn.Module, max_grad_norm: float) -> float:
    """Scale the gradient down to the global norm `max_grad_norm`; returns the norm it had."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def _refuse(
    step: int, metrics: dict[str, float], seen: list[tuple[Tensor, Tensor]], name: Callable[[int], str]
) -> NoReturn:
    """Name the items behind a loss, or else a gradient, that is not finite."""
    index, losses = (torch.cat(parts).cpu() for parts in zip(*seen, strict=True))
    refuse(
        f"loss and gradient of optimizer step {step}",
        f"{metrics['loss']} and norm {metrics['grad_norm']}",
        (index if math.isfinite(metrics["loss"]) else index[~losses.isfinite()]).tolist(),
        name,
        "The last checkpoint is untouched; look at these items of the training data, or lower the learning rate.",
    )


def refuse(what: str, found: str, rows: list[int], name: Callable[[int], str], advice: str) -> NoReturn:
    """Raise a RuntimeError for a number that is not finite, which names its rows on all ranks. A collective."""
    named = "".join(f"\n  {name(row)}" for row in sorted(set(gathered(rows))))
    raise RuntimeError(f"{what} must be finite, got {found} from{named}\n{advice}")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of each module is put back, whatever is raised."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation; random states are put back, too."""
    rng = get_rng()
    try:
        with evaluating(model):
            yield
    finally:
        set_rng(rng)
        free_sharded()  # those that it measured against


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect signals that ask to stop, then put the former handlers back. Only a main thread gets any."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(signum: int, _: object) -> None:
        if is_main() and not received:
            os.write(2, b"\nstopping: finish this step, save, exit\n")  # print is not safe in a handler
        received.append(signum)

    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the user, the machine, Slurm
    former = {signum: signal.signal(signum, receive) for signum in stopping}
    try:
        yield received
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler or signal.SIG_DFL)
