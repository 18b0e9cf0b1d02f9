"""Every layout of a model on two and four processes against one process."""

import contextlib
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from ranks import together
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from whole_runs import frozen, losses, other_model, own

from dpo import evaluate, score, sft, train
from dpo.data.batches import collate_responses
from dpo.policy import attention
from dpo.policy import model as models
from dpo.policy.logps import packable, sequence_logps
from dpo.settings import sft_of
from dpo.sweep.signature import instantiate
from dpo.training import distributed
from dpo.training.loop import Stopped

pytestmark = pytest.mark.long
torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
KINDS = ("gpt2", "gpt_neox", "llama", "mixtral", "qwen2")  # the first and the last have tied weights
LAYOUTS = {
    "packed": [],
    "recompute": ["activation_checkpointing=true", "packed=false"],
    "copies": ["sharding.group=2"],
    "offload": ["sharding.offload=true"],
    "ema": ["reference=ema", "reference.every=2"],
    "other": ["reference=other", "keep=best", "evaluate_every=1"],
    "sft": ["policy.path=null", "sft.steps=4", "checkpoint_every=2"],
    "bf16": ["precision=bf16"],
}
STOPPED = ("copies", "offload")
SCORES = ("data", "policy", "reference", "per_token", "max_")  # settings that scoring has, too
BRANCHES = [([5, 6, 7], [[8, 9], [9]]), ([10, 11] * 6, [[11, 12, 13, 14], [13, 14, 15] * 5]), ([15], [[16], [17, 3]])]
FEWER = ("copies",)  # of four processes, which are two copies of two parts
ALONE = {"copies": "packed", "offload": "packed"}  # a layout of several processes -> what that is in one


def given(directory: Path) -> dict[str, str]:
    return json.loads((directory / "models.json").read_text())


def config(directory: Path, name: str, processes: int):
    overrides = [*own(directory, given(directory)["llama"]), *LAYOUTS[name], "batch_size=12", "micro_batch_tokens=100"]
    overrides += ["steps=4", "epochs=9", f"processes={processes}"]  # 24 pairs
    if name == "sft":
        overrides.append(f"policy.base={given(directory)['llama']}")
    if name == "other":
        overrides.append(f"reference.path={given(directory)['other']}")
    return frozen(place(directory, name, processes), *overrides)  # with a cache for each number of processes


def place(directory: Path, name: str, processes: int) -> Path:
    return directory / str(processes) / name


def run(directory: Path, name: str, processes: int) -> None:
    place(directory, name, processes).mkdir(parents=True, exist_ok=True)
    train.run(config(directory, name, processes), place(directory, name, processes))


def scored(directory: Path, processes: int) -> None:
    """`dpo.score` on the pairs of the runs, with a cache for each number of processes."""
    place(directory, "scores", processes).mkdir(parents=True, exist_ok=True)
    overrides = [*own(directory, given(directory)["qwen2"]), "reference=initial", "per_token=true"]
    overrides = [one for one in overrides if one.startswith(SCORES)]
    settings = frozen(place(directory, "scores", processes), *overrides, f"processes={processes}", verb="score")
    settings.choices = {"reference": "initial"}
    score.run(settings, place(directory, "scores", processes))


def anonymous() -> int:
    """Bytes of memory that this process holds, files that it maps aside."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


class Peak:
    """The most that `anonymous` grew by while the context lasted."""

    def __enter__(self):
        self.before, self.most, self.ended = anonymous(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.ended.wait(0.002):
            self.most = max(self.most, anonymous() - self.before)

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()


SPOILT = {  # how a model's attention is spoilt, and what the start-up check says then
    "not at all": True,
    "layers pass nothing on": False,
    "branches see each other": False,
}


CHECKED = [(precision, spoilt) for precision in ("fp32", "bf16") for spoilt in SPOILT]


def checked(precision: str, spoilt: str) -> dict[str, object]:
    """What the start-up check says of a sharded model, and how far the log-probs are off that it then has."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 57, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)  # sharp attention, so that a wrong mask shows
    plain, _ = sequence_logps(model, collate_responses(BRANCHES, packed=False))
    block, attends = model.model.layers[1], attention.attends
    forward = block.forward
    if spoilt == "layers pass nothing on":
        block.forward = lambda *given, prefix_mask=None, **named: forward(*given, **named)
    distributed.shard(
        model, distributed.ParallelLayout(group=None, offload=False, precision=precision), torch.device("cpu")
    )
    try:
        if spoilt == "branches see each other":
            attention.attends = lambda branch, position, other, others, window: position >= others
        packed = packable(model, BRANCHES)
    finally:
        attention.attends = attends
    values, _ = sequence_logps(model, collate_responses(BRANCHES, packed=packed))
    values.sum().backward()
    again, _ = sequence_logps(model, collate_responses(BRANCHES, packed=packed))
    return {"said": packed, "off": ((values - plain) / plain).abs().max().item(), "same": torch.equal(values, again)}


def several(directory: Path, processes: int) -> None:
    """What each process does."""
    device, told = distributed.join("cpu"), {}
    layout = distributed.ParallelLayout(group=None, offload=False, precision="fp32")
    for kind in KINDS:
        model, _ = models.load(models.ModelSpec(given(directory)[kind], layout=layout), device)
        told[kind] = {"fingerprint": models.fingerprint(model)}
        told[kind]["parts"] = all(isinstance(weight, DTensor) for weight in model.parameters())
        mine = sum(weight.to_local().numel() for weight in model.parameters())
        told[kind]["share"] = mine / sum(weight.numel() for weight in model.parameters())
        with torch.no_grad():
            told[kind]["logits"] = model(torch.arange(12)[None]).logits[0, :, :5].tolist()
        told[kind]["stops"] = model.generation_config.eos_token_id
        models.save(model, models.load_tokenizer(given(directory)[kind]), directory / f"{processes}-{kind}")
    told["checked"] = {f"{precision}, {spoilt}": checked(precision, spoilt) for precision, spoilt in CHECKED}
    distributed.FILE_BYTES = 2e7
    with Peak() as reading:
        large, tokenizer = models.load(models.ModelSpec(given(directory)["large"], layout=layout), device)
    with Peak() as writing:
        models.fingerprint(large)
        models.save(large, tokenizer, directory / f"{processes}-large")
    size = sum(weight.nbytes for weight in large.parameters())
    told["peaks"] = [reading.most / size, writing.most / size]
    leave, distributed.leave = (
        distributed.leave,
        lambda: None,
    )  # one group for all runs: under torchrun a second one hangs
    for name in LAYOUTS if processes == 2 else FEWER:
        run(directory, name, processes)
    if processes == 2:
        scored(directory, processes)
        for name in STOPPED:
            stopped_and_resumed(directory, name)
        told["sft"] = stopped_sft(directory)
    (directory / f"{processes}-rank-{distributed.rank()}.json").write_text(json.dumps(told))
    leave()


def stopped_and_resumed(directory: Path, name: str) -> None:
    """A run of two processes, of which one is told to stop after step 2."""
    LAYOUTS[f"{name}, stopped"] = [*LAYOUTS[name], "evaluate_every=2"]
    show, looks = evaluate.show, iter((0, 2, 4))

    def stop(*given):
        if next(looks) == 2 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return show(*given)

    evaluate.show = stop
    with contextlib.suppress(Stopped):
        run(directory, f"{name}, stopped", 2)
        raise AssertionError("it was not stopped")
    evaluate.show = show
    run(directory, f"{name}, stopped", 2)


def stopped_sft(directory: Path) -> tuple[bool, list[str]]:
    """SFT of a run, of which one process is told to stop: whether it is sharded, and both outcomes."""
    settings, seen = config(directory, "sft", 2), []
    demonstrations = instantiate(settings.data).demonstrations
    whole, cached = sft.cached_policy(sft_of(settings), demonstrations, torch.device("cpu"))
    assert cached

    def stop(model, batch):
        seen.append(distributed.is_sharded(model))
        if len(seen) == 5 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return sequence_logps(model, batch)

    settings.cache, sft.sequence_logps = str(directory / "stopped SFT"), stop
    with contextlib.suppress(Stopped):
        sft.cached_policy(sft_of(settings), demonstrations, torch.device("cpu"))
        raise AssertionError("it was not stopped")
    sft.sequence_logps = sequence_logps
    again, cached = sft.cached_policy(sft_of(settings), demonstrations, torch.device("cpu"))
    assert not cached
    return all(seen), [models.fingerprint(models.load(path)[0]) for path in (whole, again)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_model) -> Path:
    directory = tmp_path_factory.mktemp("layouts")
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "vocab_size": 500}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(directory / "large")  # 39 M parameters
    AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(directory / "large")
    (directory / "models.json").write_text(
        json.dumps(
            {kind: tiny_model(kind) for kind in KINDS}
            | {"other": other_model(directory, tiny_model), "large": str(directory / "large")}
        )
    )
    for name in LAYOUTS.keys() - ALONE:
        run(directory, name, 1)
    scored(directory, 1)
    return directory


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, directory) -> int:
    together(several, directory, request.param, processes=request.param)
    return request.param


def rows(directory: Path, name: str, processes: int) -> list[dict[str, float]]:
    lines = (place(directory, name, processes) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == "train"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradient_norms_are_those_of_one_process(directory, processes, name):
    if processes == 4 and name not in FEWER:
        return
    alone = ALONE.get(name, name)
    several, one = rows(directory, name, processes), rows(directory, alone, 1)
    exact = name != "bf16"
    assert len(one) == 4
    assert losses(several) == pytest.approx(losses(one), rel=1e-5 if exact else 2e-2)
    norms = [[row["grad_norm"] for row in some] for some in (several, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4 if exact else 5e-2)
    if exact:
        places = place(directory, name, processes), place(directory, alone, 1)
        ends = [json.loads((folder / "evaluation.json").read_text()) for folder in places]
        for kl in ("kl", *(["kl_reference"] if name == "other" else [])):  # to a model with other rows to spare, too
            assert ends[0][kl] == pytest.approx(ends[1][kl], rel=1e-3)
        assert ends[0]["rewards/accuracies"] == ends[1]["rewards/accuracies"]


@pytest.mark.parametrize("name", STOPPED)
def test_stopped_on_one_rank_it_resumes_bit_equal(directory, processes, name):
    if processes == 2:
        stopped, whole = (losses(rows(directory, one, 2)) for one in (f"{name}, stopped", name))
        assert stopped == whole
        assert not (place(directory, f"{name}, stopped", 2) / "checkpoint").exists()


def test_sft_of_a_run_is_sharded_and_resumes_bit_equal(directory, processes):
    if processes == 2:
        sharded, [whole, again] = json.loads((directory / "2-rank-1.json").read_text())["sft"]
        assert sharded
        assert whole == again


@pytest.mark.parametrize("split", score.SPLITS)
def test_two_processes_score_as_one(directory, processes, split):
    if processes == 2:
        files = (place(directory, "scores", number) / f"{split}.jsonl" for number in (1, 2))
        alone, both = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
        assert len(alone) == {"train": 21, "validation": 9}[split]
        for one, two in zip(alone, both, strict=True):
            assert two.keys() == one.keys() >= {"chosen_logprob", "rejected_token_logprobs"}
            for name, value in one.items():
                assert two[name] == (pytest.approx(value, rel=1e-5) if "logprob" in name else value)


@pytest.mark.parametrize("kind", KINDS)
def test_each_reads_its_part_of_the_files_and_writes_it(directory, processes, kind, tmp_path):
    whole, _ = models.load(given(directory)[kind])
    told = [json.loads((directory / f"{processes}-rank-{rank}.json").read_text())[kind] for rank in range(processes)]
    with torch.no_grad():
        logits = whole(torch.arange(12)[None]).logits[0, :, :5]
    for one in told:
        assert one["fingerprint"] == models.fingerprint(whole)
        assert one["parts"]
        assert one["share"] < 1.3 / processes
        assert one["stops"] == whole.generation_config.eos_token_id
        assert torch.allclose(torch.tensor(one["logits"]), logits, atol=1e-5)
    saved, tokenizer = models.load(str(directory / f"{processes}-{kind}"))
    assert models.fingerprint(saved) == models.fingerprint(whole)
    models.save(saved, tokenizer, tmp_path / "whole")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (directory / f"{processes}-{kind}" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert {path.suffix for path in (directory / f"{processes}-{kind}").iterdir()} <= {
        ".json",
        ".safetensors",
        ".jinja",
    }


@pytest.mark.parametrize("precision,spoilt", CHECKED)
def test_a_sharded_model_is_checked_and_falls_back_on_all_ranks(directory, processes, precision, spoilt):
    for rank in range(processes):
        told = json.loads((directory / f"{processes}-rank-{rank}.json").read_text())["checked"]
        told = told[f"{precision}, {spoilt}"]
        assert told["said"] is SPOILT[spoilt]
        assert told["off"] < (1e-5 if precision == "fp32" else 2e-2)
        assert told["same"]


def test_no_process_holds_the_model_whole(directory, processes):
    for rank in range(processes):
        reading, writing = json.loads((directory / f"{processes}-rank-{rank}.json").read_text())["peaks"]
        assert reading < 1 / processes + 0.1  # its own part
        assert writing < 0.35  # a file of an eighth, and what a copy of it takes
