"""One process against two."""

import errno
import gc
import json
import os
import signal
import weakref
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from loops import Items
from ranks import together
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from dpo import evaluate
from dpo.policy.logps import packable
from dpo.training import checkpoint, distributed
from dpo.training.log import Log
from dpo.training.loop import Stopped, fit
from dpo.training.optim import optimizer, schedule

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
SIZES = {"vocab_size": 41, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
WHOLE = distributed.ParallelLayout(group=None, offload=False, precision="fp32")
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def llama(tied):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=tied, use_cache=False))


class Windows:
    """23 items in windows of 8, 8 and 7, dealt to the ranks and filled up so that all make as many passes."""

    def __init__(self, micro_batch_size):
        self.size = micro_batch_size

    def __len__(self):
        return 3

    def name(self, row):
        return f"item {row}"

    def at(self, step):
        rank, world_size = distributed.rank(), distributed.world_size()
        order = np.random.default_rng(step // 3).permutation(23)[step % 3 * 8 :][:8].tolist()
        filled = order + order[:1] * (-len(order) % world_size)
        mine = list(range(rank, len(filled), world_size))
        micro_batches = []
        for first in range(0, len(mine), self.size):
            places = mine[first : first + self.size]
            real = torch.tensor([place < len(order) for place in places])
            micro_batches.append(Items(torch.tensor([filled[place] for place in places]), real))
        return micro_batches, len(order)


def train(directory, steps, tied=False, micro_batch_size=8, disturb=None, before=None, **options):
    """The model of one run on fixed random tokens. disturb(passes, rows, losses) returns the losses. before: called
    when the model is there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model = distributed.shard(llama(tied), WHOLE, torch.device("cpu"))
    optim = optimizer(model, "adamw", 1e-2, [0.9, 0.99], 0.01)
    if before:
        before()
    tokens = torch.randint(41, (23, 9), generator=torch.Generator().manual_seed(1))
    passes = count(1)

    def step(batch):
        input_ids = tokens[batch.index]
        logps = model(input_ids).logits[:, :-1].log_softmax(-1)
        losses = -logps.gather(2, input_ids[:, 1:, None]).squeeze(2)  # (B, 8)
        total = losses.sum(1)
        return disturb(next(passes), batch.index, total) if disturb else total, {"first": losses[:, 0]}

    with Log(directory) as log:
        fit(
            model,
            Windows(micro_batch_size),
            step,
            optim,
            schedule(optim, "constant", 2, 6),
            steps=steps,
            **{"max_grad_norm": 1.0, "precision": "fp32", "checkpoint_every": 3, **options},
            log=log,
            directory=directory / "checkpoint",
        )
    return model


def metrics(directory):
    kept = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "epoch", "loss", "first", "grad_norm", "lr")} for row in kept]


def close(some, others):
    assert len(some) == len(others) == 6
    for one, other in zip(some, others, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)


# What the two processes do


def outcome(directory, disturb):
    try:
        train(directory, 6, micro_batch_size=2, disturb=disturb)
    except (Stopped, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def kill_rank_1(passes, index, losses):
    if passes == 8 and distributed.rank() == 1:  # the second of two micro-batches of step 4
        os.kill(os.getpid(), signal.SIGTERM)
    return losses


def fill_disk_of_rank_1(passes, index, losses):
    if passes == 8 and distributed.rank() == 1:
        write = checkpoint.HuggingFaceStorageWriter.write_data

        def full(writer, *given):
            if "step-6" in str(writer.path):  # a slow machine may still write step 3
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(writer, *given)

        checkpoint.HuggingFaceStorageWriter.write_data = full
    return losses


def fail_to_rename_on_rank_0(passes, index, losses):
    if passes == 8 and distributed.rank() == 0:
        rename = Path.rename

        def fail(path, target):  # PyTorch renames, too
            if target.name == "step-6":
                Path.rename = rename
                raise OSError(errno.EACCES, "Permission denied")
            return rename(path, target)

        Path.rename = fail
    return losses


def spoil_row_11(passes, index, losses):
    return losses.where(index != 11, float("nan"))


def attends_in_its_own_way(model):
    """Not by packed rows, which shows behind the last layer, within the model's forward."""
    layer = model.model.layers[1].self_attn
    forward = layer.forward

    def own_way(*args, prefix_mask=None, **kwargs):
        model.config._attn_implementation = "eager"
        return forward(*args, **kwargs)

    layer.forward = own_way


def needs_a_mask(model):
    """Which a packed row has none of: that shows within a layer."""
    layer = model.model.layers[1].self_attn
    forward = layer.forward
    layer.forward = lambda *args, attention_mask, **kwargs: forward(
        *args, attention_mask=attention_mask.to("cpu"), **kwargs
    )


def refuse():
    raise ValueError(f"refused by {distributed.rank()}")


def two_processes(directory):
    assert distributed.world_size() == 1
    device = distributed.join("cpu")
    assert distributed.join("cpu") == device  # as often as stages ask for it
    rank, told = distributed.rank(), {}
    told["joined"] = [str(device), distributed.world_size(), rank == int(os.environ["RANK"]), distributed.is_main()]
    told["sums"] = [distributed.all_sum(torch.tensor([1.0, rank])).tolist(), distributed.any_true(rank == 1)]
    told["sums"].append(distributed.any_true(False))
    told["gathered"] = distributed.gathered([f"of {rank}"] * (1 + rank))
    asked: list[int] = []
    told["made"] = [distributed.on_main(lambda: asked.append(rank) or f"by {rank}"), asked]
    try:
        distributed.on_main(refuse)
    except ValueError as error:
        told["refused"] = str(error)
    drawn = [f"by {rank}"] * (1 + rank)  # as many as rounding has it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_encoded", lambda *_: [])
        patch.setattr(evaluate, "_drawn", lambda *_: drawn)
        told["drawn"] = evaluate.respond(None, None, [], None, "policy")
    for tied in (False, True):
        for micro_batch_size in (2, 4):
            model = train(directory / f"two-{tied}-{micro_batch_size}", 6, tied, micro_batch_size)
    told["sharded"] = [isinstance(layer, FSDPModule) for layer in [*model.model.layers, model, model.lm_head]]
    told["packable"] = []
    for hinder in (None, attends_in_its_own_way, needs_a_mask):
        tried = distributed.shard(llama(False), WHOLE, device)
        if hinder:
            hinder(tried)
        found = packable(tried, [([5, 6], [[7], [8, 9]])])
        told["packable"].append([found, all(isinstance(weight, DTensor) for weight in tried.parameters())])
    told["sharded"].append(distributed.is_sharded(model))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    told["state"] = len(state)
    if rank == 0:
        torch.save(state, directory / "state.pt")
    train(directory / "from-two", 3, micro_batch_size=2)
    train(directory / "from-one", 6, micro_batch_size=2)
    told["stopped"] = outcome(directory / "stopped", kill_rank_1)
    told["resumed"] = outcome(directory / "stopped", None)
    told["spoilt"] = outcome(directory / "spoilt", spoil_row_11)
    told["unnamed"] = outcome(directory / "unnamed", fail_to_rename_on_rank_0)
    told["full"] = outcome(directory / "full", fill_disk_of_rank_1)
    distributed.leave()
    told["left"] = not dist.is_initialized() and distributed.world_size() == 1
    (directory / f"rank-{rank}.json").write_text(json.dumps(told))


def models_come_and_go(directory):
    """A sharded model is used and dropped before another is made, before training, and at an evaluation."""
    device, told = distributed.join("cpu"), {"groups": [], "alive": []}
    gc.disable()  # Python itself looks for garbage when it likes

    def come_and_go(_=0):
        model = distributed.shard(llama(False), distributed.ParallelLayout(1, False, "fp32"), device)
        model(torch.tensor([[1]]))
        told["groups"].append(len(dist.distributed_c10d._world.pg_map))
        weights.append(weakref.ref(next(model.parameters())))

    def look(passes, index, losses):
        if passes == 1:
            told["alive"].append(weights[-1]() is not None)
        return losses

    weights = []
    for group in (None, 1):
        mesh = distributed._mesh("cpu", group)
        ranks = [dist.get_process_group_ranks(one) for one in mesh.get_all_groups()]
        waits = {one._get_backend(torch.device("cpu")).options._timeout.days for one in mesh.get_all_groups()}
        told.setdefault("meshes", []).append([mesh.mesh_dim_names, ranks, [*waits]])
    come_and_go()
    come_and_go()
    told["alive"].append(weights[0]() is not None)
    train(directory / "reference", 1, disturb=look, before=come_and_go)
    train(directory / "evaluation", 1, disturb=look, evaluate=come_and_go)
    rank = distributed.rank()
    distributed.leave()
    told["kept"] = distributed._mesh.cache_info().currsize  # of a group that is no more
    (directory / f"models-{rank}.json").write_text(json.dumps(told))


# What is asked of them


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharding")
    for tied in (False, True):
        model = train(directory / f"one-{tied}", 6, tied)
    torch.save(model.state_dict(), directory / "expected.pt")
    train(directory / "from-one", 3)
    together(two_processes, directory, processes=2)
    return directory


@pytest.fixture(scope="module")
def told(directory):
    return [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_join_sum_leave(told):
    assert [told[rank]["joined"] for rank in (0, 1)] == [["cpu", 2, True, True], ["cpu", 2, True, False]]
    assert told[0]["sums"] == told[1]["sums"] == [[2.0, 1.0], True, False]
    assert told[0]["gathered"] == told[1]["gathered"] == ["of 0", "of 1", "of 1"]
    assert told[0]["left"]


def test_what_rank_0_makes_or_refuses_is_that_of_all(told):
    assert [one["made"] for one in told] == [["by 0", [0]], ["by 0", []]]
    assert [one["refused"] for one in told] == ["refused by 0"] * 2


def test_responses_are_those_of_rank_0(told):
    """Where ranks drew others, they would measure KL in other passes, and wait for each other."""
    assert [one["drawn"] for one in told] == [["by 0"]] * 2


def test_blocks_and_root_are_sharded(told):
    assert told[0]["sharded"] == [True, True, True, True, False, True]
    assert not distributed.is_sharded(llama(False))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_two_processes_equal_one(directory, tied, micro_batch_size):
    close(metrics(directory / f"two-{tied}-{micro_batch_size}"), metrics(directory / f"one-{tied}"))


def test_weights_of_two_are_those_of_one(directory, told):
    assert told[1]["state"] == 0
    state, expected = torch.load(directory / "state.pt"), torch.load(directory / "expected.pt")
    assert state.keys() == expected.keys()
    assert all(torch.allclose(state[key], expected[key], atol=1e-4) for key in expected)


def test_checkpoint_of_two_resumes_in_one_and_the_reverse(directory):
    train(directory / "from-two", 6)
    close(metrics(directory / "from-two"), metrics(directory / "one-False"))
    close(metrics(directory / "from-one"), metrics(directory / "one-False"))


def test_signal_to_one_rank_stops_both_at_one_step(directory, told):
    message = "Stopped: training stopped at step 4 of 6; the same command resumes there"
    assert [told[rank]["stopped"] for rank in (0, 1)] == [message] * 2
    assert [told[rank]["resumed"] for rank in (0, 1)] == ["finished"] * 2
    assert metrics(directory / "stopped") == metrics(directory / "two-False-2")  # bit-equal


def test_a_model_that_cannot_be_packed_is_left_sharded(told):
    assert [told[rank]["packable"] for rank in (0, 1)] == [[[True, True], [False, True], [False, True]]] * 2


def test_loss_that_is_not_finite_names_the_rows_of_all_ranks(told):
    step = next(step for step in range(3) if any(11 in batch.index for batch in Windows(8).at(step)[0]))
    assert told[0]["spoilt"] == told[1]["spoilt"]
    assert f"optimizer step {step + 1} must be finite" in told[0]["spoilt"]
    assert "from\n  item 11\nThe last" in told[0]["spoilt"]


def test_only_rank_0_cannot_rename(directory, told):
    for rank in (0, 1):
        assert "could not save step 6" in told[rank]["unnamed"]
        assert "Permission denied" in told[rank]["unnamed"]
    assert [path.name for path in (directory / "unnamed" / "checkpoint").iterdir()] == ["step-3"]


def test_full_disk_of_one_rank(directory, told):
    for rank in (0, 1):
        assert "RuntimeError: could not save step 6" in told[rank]["full"]
        assert "No space left on device" in told[rank]["full"]
        assert "step 3 is intact" in told[rank]["full"]
    assert [path.name for path in (directory / "full" / "checkpoint").iterdir()] == ["step-3"]


def test_models_share_process_groups_and_give_their_memory_back(tmp_path):
    together(models_come_and_go, tmp_path, processes=2)
    for rank in (0, 1):
        told = json.loads((tmp_path / f"models-{rank}.json").read_text())
        assert told["meshes"] == [[None, [[0, 1]], [1]], [["copy", "part"], [[0, 1], [rank]], [1]]]
        assert told["groups"][:3] == [3] * 3  # then each training has one for its checkpoints
        assert told["alive"] == [False] * 3
        assert told["kept"] == 0


def test_one_process_needs_no_group():
    model = nn.Linear(2, 2)
    assert distributed.shard(model, WHOLE, torch.device("cpu")) is model
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.any_true(True)
    assert not distributed.any_true(False)
    assert distributed.on_main(lambda: "made") == "made"
    tensor = torch.ones(2, requires_grad=True)
    total = distributed.all_sum(tensor)
    assert not total.requires_grad
    total += 1
    assert tensor.tolist() == [1, 1]
    there = torch.empty(2, device="meta")
    assert distributed.part(total, there).device == there.device


def test_rank_0_speaks_before_the_group_is_joined(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert not distributed.is_main()


def test_blocks_are_the_layers():
    model = llama(False)
    model.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)])
    assert distributed.blocks(model) == list(model.model.layers)
    model.model.layers.append(nn.ModuleList([nn.Linear(2, 2)]))  # of another class, as hybrids have
    assert distributed.blocks(model) == list(model.model.layers)
    assert distributed.blocks(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_layout_reaches_every_block(monkeypatch, kind, group, precision, offload):
    """Each block, and then the rest: its processes, the dtype of gathered weights and of gradients, where they live."""
    sharded = []
    monkeypatch.setattr(distributed, "world_size", lambda: 6)
    monkeypatch.setattr(distributed, "_mesh", lambda *given: given)
    monkeypatch.setattr(distributed, "fully_shard", lambda part, **named: sharded.append((part, named)))
    model = llama(False)
    assert distributed.shard(model, distributed.ParallelLayout(group, offload, precision), torch.device(kind)) is model
    assert [part for part, _ in sharded] == [*model.model.layers, model]
    for part, named in sharded:
        dtypes, place = named.get("mp_policy"), named.get("offload_policy")
        assert named["mesh"] == (kind, group)
        assert dtypes == (MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else None)
        assert place == (CPUOffloadPolicy(pin_memory=kind == "cuda") if offload else None)
        assert named.get("reshard_after_forward") is (True if part is model else None)


def test_files_have_a_limit(monkeypatch):
    """A tensor that is larger than the limit has a file of its own."""
    assert distributed.FILE_BYTES == 4e9
    monkeypatch.setattr(distributed, "FILE_BYTES", 40)
    sizes = {"a": 4, "b": 6, "c": 1, "d": 20, "e": 1}  # of 4 bytes
    files = distributed.in_files({name: torch.zeros(size) for name, size in sizes.items()})
    assert files == {"a": 1, "b": 1, "c": 2, "d": 3, "e": 4}
    assert distributed.in_files({"d": torch.zeros(20), "e": torch.zeros(1)}) == {"d": 1, "e": 2}


def test_device(monkeypatch):
    assert distributed.device("cpu") == distributed.device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="auto, cpu or cuda, got tpu"):
        distributed.device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert distributed.device("auto") == torch.device("cpu")
    with pytest.raises(RuntimeError, match="found 0"):
        distributed.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "9")
    assert distributed.device("cpu") == torch.device("cpu")
    for cuda in ("auto", "cuda", "cuda:0", torch.device("cuda", 0)):  # that of this process, whichever was asked for
        assert distributed.device(cuda) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RuntimeError, match="process 2 of this machine needs a CUDA device of its own, found 2"):
        distributed.device("cuda")


def test_each_device_has_its_way_to_talk(monkeypatch):
    """Once it has joined, a process is where it was told to be; what is on CPUs goes by gloo beside GPUs, too."""
    groups, set_to = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: groups.append((backend, timeout)))
    monkeypatch.setattr(distributed, "_here", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.here() == torch.device("cuda", 0)
    for name in ("cpu", "cuda"):
        assert distributed.join(name) == distributed.here() == distributed.device(name)
    assert groups == [("gloo", distributed.TIMEOUT), ("cpu:gloo,cuda:nccl", distributed.TIMEOUT)]
    assert set_to == [torch.device("cuda", 0)]
