"""What only a GPU can show: `pytest -m cuda -n 8 --dist load` where there is one; elsewhere these are not selected.
Most of the time goes into compiling attention, some 15 seconds a variant on one core, hence the processes.

The oracle is each sequence in a row of its own, in float64 on the CPU, by the library's eager attention.
"""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from transformers import Gemma2Config, GenerationConfig, LlamaConfig, MistralConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from whole_runs import SMALL, frozen, losses, once, run

from dpo import train
from dpo.data.batches import Pair, collate_pairs
from dpo.losses import PairLogps, dpo
from dpo.policy import logps as scored
from dpo.policy import model as models
from dpo.policy.logps import HeadLogps, packable, sequence_kl, sequence_logps
from dpo.policy.sampling import Sampling, sample
from dpo.policy.scoring import Scoring, _score
from dpo.training import distributed
from dpo.training.loop import Stopped, autocast
from dpo.training.optim import optimizer

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("error:flex_attention called without")]
GPU = torch.device("cuda", 0)
BETA = 0.1
SIZES = {"vocab_size": 1000, "num_hidden_layers": 2, "max_position_embeddings": 2048, "use_cache": False}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0, "query_pre_attn_scalar": 64, "head_dim": 64}


@pytest.fixture(autouse=True)
def threads():
    """Enough of them for the oracle."""
    former = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(former)


def heads(size, count, groups):
    return {
        "hidden_size": size * count,
        "intermediate_size": 2 * size * count,
        "num_attention_heads": count,
        "num_key_value_heads": groups,
    }


CONFIGS = {
    "llama 64": LlamaConfig(**SIZES, **heads(64, 4, 4)),
    "llama 64, grouped": LlamaConfig(**SIZES, **heads(64, 4, 2), tie_word_embeddings=True),
    "llama 128, grouped": LlamaConfig(**SIZES, **heads(128, 6, 2)),
    "llama 80": LlamaConfig(**SIZES, **heads(80, 4, 4)),
    "mistral, window": MistralConfig(**SIZES, **heads(64, 4, 2), sliding_window=96),
    "gemma2, window and caps": Gemma2Config(**SIZES, **heads(64, 4, 2), sliding_window=96, **CAPS),
}
LENGTHS = {  # prompt, chosen, rejected; no total is a multiple of a block of 128
    "short": [(3, 2, 4), (9, 1, 1), (17, 5, 30)],
    "long": [(301, 260, 257), (130, 1, 63), (7, 100, 129), (256, 128, 3)],
}


def model_of(kind):
    """Random weights, sharp enough for a wrong mask to show."""
    torch.manual_seed(0)
    config = CONFIGS[kind] if isinstance(kind, str) else kind
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=1.5 * config.hidden_size**-0.5)
    return model


def pairs_of(lengths, seed=1, vocabulary=1000):
    generator = torch.Generator().manual_seed(seed)
    sides = [[torch.randint(2, vocabulary, (n,), generator=generator).tolist() for n in sizes] for sizes in lengths]
    return [Pair(*three) for three in sides]


def batch_of(pairs, packed=True):
    real = torch.ones(len(pairs), dtype=torch.bool)
    return collate_pairs(pairs, torch.arange(len(pairs)), real, pad_id=0, packed=packed).to(GPU)


def dpo_loss(found, table):
    count = len(found) // 2
    lengths = torch.ones(2, count, device=found.device)
    return dpo(PairLogps(*found.chunk(2), *table.chunk(2), *lengths), BETA, label_smoothing=0.0).losses.mean()


def exact(model, pairs, table):
    """Log-probs, loss and gradients in float64, one sequence at a time."""
    attention, model = model.config._attn_implementation, model.double()
    model.set_attn_implementation("eager")
    found = []
    for prompt, response in [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        places = torch.arange(len(response)) + len(prompt) - 1
        found.append(logits[places, torch.tensor(response)].sum())
    found = torch.stack(found)
    loss = dpo_loss(found, found.detach() + table.double())
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.float().set_attn_implementation(attention)
    return found.detach(), loss.item(), gradients


def off(found, expected):
    """Relative error in the 2-norm."""
    found, expected = ([one.double().cpu().flatten() for one in some] for some in (found, expected))
    return ((torch.cat(found) - torch.cat(expected)).norm() / torch.cat(expected).norm()).item()


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_packed_rows_are_separate_rows(kind):
    """Values, loss and gradients; fp32 is fp32 (tf32 would be off by some 3e-4), bf16 what bf16 can be."""
    for name in LENGTHS if kind == "llama 64" else ["long"]:
        lengths = LENGTHS[name]
        pairs, table = pairs_of(lengths), torch.linspace(-0.5, 0.5, 2 * len(lengths))
        model = model_of(kind)
        right, right_loss, right_gradients = exact(model, pairs, table)
        model.to(GPU)
        for precision, near in {"fp32": (2e-6, 1e-5, 2e-5), "bf16": (1e-2, 2e-2, 6e-2)}.items():
            for packed in (True, False):
                if kind.startswith("gemma2") and not packed:
                    continue  # the library's sdpa has no soft-cap
                with autocast(precision, GPU):
                    found, _ = sequence_logps(model, batch_of(pairs, packed))
                loss = dpo_loss(found, (right + table.double()).float().to(GPU))
                loss.backward()
                of_weights = [weight.grad for _, weight in model.named_parameters()]
                errors = (
                    off([found], [right]),
                    abs(loss.item() - right_loss),
                    off(of_weights, [*right_gradients.values()]),
                )
                print(kind, name, precision, "packed" if packed else "padded", [f"{error:.1e}" for error in errors])
                model.zero_grad()
                if precision == "fp32" or packed:
                    assert all(error < most for error, most in zip(errors, near, strict=True)), (precision, packed)


def test_batches_of_other_shapes_are_not_compiled_again():
    """Only the first ones are, with gradients and without, and one whose row fits a block."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, generator = model_of("llama 64, grouped").to(GPU), torch.Generator().manual_seed(0)
    graphs = []
    for number in range(24):
        count = int(torch.randint(1, 7, (), generator=generator))
        pairs = pairs_of(torch.randint(2, 300, (count, 3), generator=generator).tolist(), seed=number)
        with autocast("bf16", GPU), torch.set_grad_enabled(number % 3 > 0):
            found, _ = sequence_logps(model, batch_of(pairs))
        if number % 3:
            found.sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    print("graphs after each batch:", graphs)
    assert graphs[-1] == graphs[6] <= 4


def test_models_of_many_kinds_in_one_process_all_stay_compiled():
    """More variants than the eight that torch compiles of a function unless it is told otherwise."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for count in range(1, 11):
        model = model_of(LlamaConfig(**SIZES, **heads(32, count, 1))).to(GPU)
        with torch.no_grad():
            sequence_logps(model, batch_of(pairs_of(LENGTHS["long"])))
    print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 10


def test_heads_too_small_for_the_kernel_get_padded_rows():
    model = model_of(LlamaConfig(**SIZES, **heads(8, 4, 4))).to(GPU)
    assert not packable(model, [pair.prompt_responses for pair in pairs_of(LENGTHS["short"])])


def test_a_policy_equal_to_its_reference_starts_at_ln_2_in_bf16():
    """Exactly, on the same batch; and within what bf16 rounds against a table that was scored in other batches."""
    model, pairs = model_of("llama 128, grouped").to(GPU), pairs_of(LENGTHS["long"] * 3)
    with torch.no_grad(), autocast("bf16", GPU):
        once, _ = sequence_logps(model, batch_of(pairs))
        again, _ = sequence_logps(model, batch_of(pairs))
    assert dpo_loss(once, again).item() == pytest.approx(math.log(2), abs=1e-7)
    settings = Scoring("", "bf16", True, 700, 2048, "error")
    sequences = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    table = torch.stack([one.sum() for one in _score(model, sequences, settings, True, "")]).to(GPU)
    apart, difference = abs(dpo_loss(once, table).item() - math.log(2)), (once - table).abs().max().item()
    print(f"packed against a table: |loss - ln 2| = {apart:.1e}, log-probs differ by {difference:.1e} nats at most")
    assert apart < 1e-2


@pytest.mark.parametrize("length", [256, 512, 1024])
def test_long_responses_in_bf16(length):
    """Sums over them are those of fp32 within a thousandth: errors of tokens do not add up."""
    model = model_of("llama 128, grouped").to(GPU)
    batch = batch_of(pairs_of([(40, length, length)] * 2))
    with torch.no_grad():
        right, _ = sequence_logps(model, batch)
        with autocast("bf16", GPU):
            found, _ = sequence_logps(model, batch)
    print(f"{length} tokens: bf16 is off by {(found - right).abs().max():.2f} of {right.abs().max():.0f} nats")
    assert ((found - right).abs() < 1e-3 * right.abs()).all()


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("vocabulary", [3000, 128_256])
def test_the_fused_head(vocabulary, cap, monkeypatch):
    """Against float64, over several tiles."""
    monkeypatch.setattr(scored, "TILE", 40 * vocabulary)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(150, 64, generator=generator), torch.randn(vocabulary, 64, generator=generator) / 4
    bias, labels = torch.randn(vocabulary, generator=generator), torch.randint(vocabulary, (150,), generator=generator)
    wide = [one.double().requires_grad_() for one in (hidden, weight, bias)]
    logits = nn.functional.linear(*wide)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    right = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    slopes = torch.randn(150, generator=generator)
    expected = torch.autograd.grad((right * slopes.double()).sum(), wide)
    for precision, near in {"fp32": (1e-6, 1e-5), "bf16": (1e-2, 1e-2)}.items():
        given = [one.to(GPU, copy=True).requires_grad_() for one in (hidden, weight, bias)]
        with autocast(precision, GPU):
            found = HeadLogps.apply(*given, labels.to(GPU), cap)
        (found * slopes.to(GPU)).sum().backward()
        errors = off([found.detach()], [right.detach()]), off([one.grad for one in given], expected)
        print(vocabulary, cap, precision, [f"{error:.1e}" for error in errors])
        assert all(error < most for error, most in zip(errors, near, strict=True))


def steps_on(device, checkpointing=False):
    """Three steps of AdamW; the norms of the gradients, and the weights."""
    model, norms = model_of("llama 64, grouped").to(device), []
    if checkpointing:
        models.checkpoint_activations(model)
    optim = optimizer(model, "adamw", 1e-3, (0.9, 0.99), 0.0)
    batch = batch_of(pairs_of(LENGTHS["long"])).to(device)
    with torch.no_grad():
        table, _ = sequence_logps(model, batch)
    for _ in range(3):
        optim.zero_grad()
        dpo_loss(sequence_logps(model, batch)[0], table).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optim.step()
    return norms, [weight.detach() for weight in model.parameters()]


def test_steps_are_those_of_the_cpu():
    (norms, weights), (expected, others) = steps_on(GPU), steps_on(torch.device("cpu"))
    assert norms == pytest.approx(expected, rel=1e-3)
    print("norms", norms, "weights off by", off(weights, others))
    assert off(weights, others) < 1e-4
    again, same = steps_on(GPU, checkpointing=True)
    assert again == norms
    assert all(torch.equal(one, other) for one, other in zip(weights, same, strict=True))


def test_responses_are_those_of_the_library(tiny_model):
    """Greedy token for token; at random the same ones for a seed, whatever the size of batches."""
    model, tokenizer = models.load(tiny_model("llama"), GPU)
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)).to(GPU))
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 40, (24,), generator=generator).tolist()
    prompts = [torch.randint(10, 300, (size,), generator=generator).tolist() for size in sizes]
    spare = sorted(set(range(model.config.vocab_size)) - set(models.vocabulary(tokenizer).tolist()))
    options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0, "suppress_tokens": spare}
    asked = GenerationConfig(eos_token_id=tokenizer.eos_token_id, use_cache=True, **options)
    rows = [torch.tensor([prompt], device=GPU) for prompt in prompts]
    expected = [model.generate(row, asked)[0, row.shape[1] :].tolist() for row in rows]
    found = sample(model, tokenizer, prompts, Sampling(32, 0.0, 1.0, 10), 0, "")
    assert [one.response_ids for one in found] == expected
    drawn = [sample(model, tokenizer, prompts * 4, Sampling(32, 1.0, 1.0, size), 5, "") for size in (96, 7)]
    same = sum(one == two for one, two in zip(*drawn, strict=True))
    print(f"{same} of {len(drawn[0])} responses are the same in batches of 96 and 7")
    assert same >= 0.95 * len(drawn[0])  # rounding moves a draw now and then
    assert sample(model, tokenizer, prompts * 4, Sampling(32, 1.0, 1.0, 96), 6, "") != drawn[0]


def test_kl():
    """Both estimates against float64 on the CPU, in both layouts."""
    policy, reference = model_of("llama 64"), model_of("llama 64")
    with torch.no_grad():
        for number, weight in enumerate(reference.parameters()):
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    pairs, ratios, kls = pairs_of(LENGTHS["long"]), [], []
    for prompt, response in [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]:
        with torch.no_grad():
            ours, others = (
                one.double()(input_ids=torch.tensor([prompt + response]))
                .logits[0, len(prompt) - 1 : -1]
                .log_softmax(-1)
                for one in (policy, reference)
            )
        kls.append((ours.exp() * (ours - others)).sum())
        ratios.append((ours - others).gather(-1, torch.tensor(response)[:, None]).sum())
    policy.float().to(GPU), reference.float().to(GPU)
    for packed in (True, False):
        found = sequence_kl(policy, reference, batch_of(pairs, packed))
        assert off(found[:1], [torch.stack(ratios)]) < 1e-4
        assert off(found[1:], [torch.stack(kls)]) < 1e-4


WORLD = once(*SMALL, "evaluate_every=2", "evaluation.prompts=10", "steps=6", "data.train=24")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """A run of the world on the CPU; the others share its cache, so that they train on its pairs."""
    folder = tmp_path_factory.mktemp("world")
    return folder, run(folder / "cpu", *WORLD, "device=cpu")


@pytest.mark.parametrize(
    "name,near,overrides",
    [
        ("fp32", 1e-4, ["precision=fp32"]),
        ("fp32, padded", 1e-4, ["precision=fp32", "packed=false"]),
        ("bf16", 6e-2, ["precision=bf16"]),
        ("bf16, padded", 6e-2, ["precision=bf16", "packed=false"]),
        ("bf16, checkpointing", 6e-2, ["precision=bf16", "activation_checkpointing=true"]),
        ("ema", None, ["reference=ema", "precision=bf16"]),
        ("whole step", None, ["loss=dr_dpo", "precision=bf16", "micro_batch_tokens=600"]),
    ],
)
def test_whole_runs(on_cpu, name, near, overrides):
    folder, (rows, measured) = on_cpu
    began = time.monotonic()
    found, figures = run(folder / name, *WORLD, "device=cuda", *overrides)
    print(f"{name}: {time.monotonic() - began:.0f} s, losses {losses(found)}, of the CPU {losses(rows)}")
    print({key: (figures.get(key), measured[key]) for key in ("loss", "win_rate", "kl") if key in measured})
    assert all(map(math.isfinite, losses(found)))
    if near:
        assert losses(found) == pytest.approx(losses(rows), abs=near)
        assert figures["loss"] == pytest.approx(measured["loss"], abs=near)


def test_a_run_from_scratch_by_its_command(tmp_path):
    """SFT, sampling, scoring, training and evaluation on the GPU, each run in a process of its own."""
    command = [sys.executable, "-m", "dpo.train", "-m", "beta=0.05,0.2", "precision=bf16,fp32", "device=cuda", *WORLD]
    where = [f"runs={tmp_path / 'runs'}", f"cache={tmp_path / 'cache'}", "wandb.mode=disabled"]
    done = subprocess.run([*command, *where], capture_output=True, text=True, check=False, timeout=300)
    print(done.stdout[-1500:], done.stderr[-3000:])
    assert done.returncode == 0
    assert len([*tmp_path.glob("runs/dev/*/evaluation.json")]) == 4


@pytest.mark.parametrize("precision,packed", [("fp32", True), ("bf16", True), ("bf16", False)])
def test_a_stopped_run_is_the_whole_run_to_the_bit(on_cpu, precision, packed, monkeypatch):
    folder, _ = on_cpu
    given = [*WORLD, "device=cuda", f"precision={precision}", f"packed={packed}".lower(), "checkpoint_every=1"]
    whole, _ = run(folder / f"whole-{precision}-{packed}", *given)
    directory = folder / f"stopped-{precision}-{packed}"
    directory.mkdir()
    write = train.Log.write

    def stopping(log, step, split, metrics):
        write(log, step, split, metrics)
        if (step, split) == (3, "train"):
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "write", stopping)
        with pytest.raises(Stopped):
            train.run(frozen(directory, *given), directory)
    rows, _ = run(directory, *given)
    assert losses(rows) == losses(whole)
    weights = [
        load_file(one / "policy" / "model.safetensors") for one in (folder / f"whole-{precision}-{packed}", directory)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture
def group(tmp_path):
    """A process group of one, as torchrun would make it: NCCL, and gloo for what is in CPU memory."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    torch.cuda.set_device(GPU)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    yield
    distributed.leave()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharded_steps_are_those_of_one_process(group, monkeypatch, precision, offload):
    """FSDP2 over one GPU: attention, head and clipping see whole weights, NCCL moves them."""
    batch, outcome = batch_of(pairs_of(LENGTHS["long"])), []
    for sharded in (False, True):
        model = model_of("llama 64, grouped")
        if sharded:
            with monkeypatch.context() as patch:  # `shard` does nothing for one process
                patch.setattr(distributed, "world_size", iter([2, 1, 1]).__next__)
                layout = distributed.ParallelLayout(None, offload, precision)
                model = distributed.shard(model if offload else model.to(GPU), layout, GPU)
        else:
            model.to(GPU)
        optim = optimizer(model, "adamw", 1e-3, (0.9, 0.99), 0.0)
        values = []
        for _ in range(3):
            optim.zero_grad()
            with autocast(precision, GPU):
                found, _ = sequence_logps(model, batch)
            loss = dpo_loss(found, found.detach() - torch.linspace(-1, 1, len(found), device=GPU))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            optim.step()
            values += [loss.item(), norm.item(), found.sum().item() / 1e3]
        outcome.append(values)
    print(precision, "offload" if offload else "", outcome)
    assert outcome[1] == pytest.approx(outcome[0], rel=1e-4 if precision == "fp32" else 5e-2)


def test_a_billion_parameters():
    """Steps in bf16 over float32 weights; the loss of a pair that is seen again falls."""
    shape = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(**shape, intermediate_size=8192, vocab_size=128_256, tie_word_embeddings=True, use_cache=False)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    with GPU:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[LlamaConfig](config)
    count = sum(weight.numel() for weight in model.parameters())
    optim = optimizer(model, "adamw", 1e-6, (0.9, 0.99), 0.0)
    batch = batch_of(pairs_of([(300, 150, 170)] * 8, vocabulary=128_000))
    with torch.no_grad(), autocast("bf16", GPU):
        table, _ = sequence_logps(model, batch)
    found = []
    for _ in range(4):
        optim.zero_grad()
        torch.cuda.synchronize()
        began = time.perf_counter()
        with autocast("bf16", GPU):
            now, _ = sequence_logps(model, batch)
        loss = dpo_loss(now, table)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        found.append((loss.item(), round(time.perf_counter() - began, 3)))
    print(f"{count / 1e9:.2f} B: (loss, s) {found}, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    assert found[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1][0] < found[0][0] - 1e-3
