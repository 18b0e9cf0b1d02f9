"""Shared-prefix attention against attention that sees the whole mask, and what is refused."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from dpo.policy import attention
from dpo.policy.attention import SharedPrefixMask, Unsupported, attend

TREES = ((3, (2, 4)), (5, ()), (1, (0, 3, 2)), (2, (6,)))
LENGTH = sum(prompt + sum(responses) for prompt, responses in TREES)


def seen(window: int | None) -> list[list[bool]]:
    """Who attends to whom, by listing what each token follows."""
    paths: list[list[int]] = []  # of each token, the places of those before it and its own
    for prompt, responses in TREES:
        first = len(paths)
        for place in range(prompt):
            paths.append([*range(first, first + place + 1)])
        for response in responses:
            start = len(paths)
            for place in range(response):
                paths.append([*range(first, first + prompt), *range(start, start + place + 1)])
    return [[other in path[-window if window else 0 :] for other in range(LENGTH)] for path in paths]


def tensors(groups: int, heads: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(1, count, LENGTH, 16) for count in (heads, groups, groups)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def expected(q, k, v, window, cap, scale):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    return (scores.masked_fill(~torch.tensor(seen(window)), -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_values_and_gradients(groups, cap, window):
    found, wanted = tensors(groups), tensors(groups)
    prefix_mask = SharedPrefixMask(TREES, torch.device("cpu"))
    out, _ = attend(nn.Module(), *found, None, prefix_mask=prefix_mask, scaling=0.3, sliding_window=window, softcap=cap)
    right = expected(*wanted, window, cap, 0.3)
    assert torch.allclose(out, right, atol=1e-12)
    weights = torch.randn(right.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (right * weights).sum().backward()
    for mine, other in zip(found, wanted, strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-11)
    plain = [one.detach() for one in found]  # what CUDA runs has no gradient on a CPU
    flex = attention._by_flex(*plain, prefix_mask.block_mask(prefix_mask.window(window)), 0.3, cap).transpose(1, 2)
    assert torch.allclose(flex, right, atol=1e-12)


def test_the_scale_is_that_of_the_head_size():
    found = tensors(4)
    out, _ = attend(nn.Module(), *found, None, prefix_mask=SharedPrefixMask(TREES, torch.device("cpu")))
    assert torch.allclose(out, expected(*found, None, None, 16**-0.5), atol=1e-12)


@pytest.mark.parametrize(
    "options,reason",
    [
        ({}, "do not pass on"),
        ({"prefix_mask": SharedPrefixMask(TREES, torch.device("cpu")), "dropout": 0.1}, "dropout"),
        ({"prefix_mask": SharedPrefixMask(TREES, torch.device("cpu")), "s_aux": torch.zeros(4)}, "sinks"),
    ],
)
def test_what_it_cannot_do_is_refused(options, reason):
    with pytest.raises(Unsupported, match=reason):
        attend(nn.Module(), *tensors(4), None, **options)


def test_flex_attention_gets_what_autocast_would_give_it(monkeypatch):
    """Rotation by float32 makes float32 of bfloat16 queries and keys; values stay."""
    given = []
    monkeypatch.setattr(attention, "flex_attention", lambda q, k, v, *_, **__: given.append((q.dtype, k.dtype)) or v)
    q, k, v = (one.detach().float() for one in tensors(4))
    prefix_mask = SharedPrefixMask(TREES, torch.device("cpu"))
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = attention._by_flex(q, k, v.bfloat16() if enabled else v, prefix_mask.block_mask(None), 0.3, None)
        expected = torch.bfloat16 if enabled else torch.float32
        assert {*given.pop(), out.dtype} == {expected}


def test_heads_that_flex_attention_does_not_take_are_refused():
    """On CUDA, when it is compiled; `packable` then takes padded rows."""
    q, k, v = (one.detach()[..., :8] for one in tensors(4))
    mask = SharedPrefixMask(TREES, torch.device("cpu")).block_mask(None)
    with pytest.raises(Unsupported, match="8 wide, where FlexAttention takes 16"):
        attention._by_flex(q, k, v, mask, 0.3, None)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("trees", [((130, (70, 300)), (5, (1,)), (300, (200, 0, 9))), ((100, (28,)),), ((3, (2, 4)),)])
def test_blocks_are_those_that_the_library_finds(monkeypatch, trees, window):
    """A few rows of blocks at a time, where the last block is not whole, and where the row is one block."""
    monkeypatch.setattr(attention, "SEEN", 3 * 128 * 1200)
    prefix_mask = SharedPrefixMask(trees, torch.device("cpu"))
    found = prefix_mask.block_mask(window)
    length = sum(prefix_mask.sizes)
    expected = create_block_mask(found.mask_mod, None, None, length, length, device="cpu")
    assert (found.shape, found.BLOCK_SIZE) == (expected.shape, expected.BLOCK_SIZE)
    names = ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks")
    for name in names:
        counts, others = getattr(found, name), getattr(expected, name)
        assert torch.equal(counts, others)
        for row in range(counts.shape[-1]):
            at = (0, 0, row, slice(counts[0, 0, row]))
            which = name.replace("num_blocks", "indices")
            assert torch.equal(getattr(found, which)[at], getattr(expected, which)[at])


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3])
def test_flex_attention_can_be_compiled(monkeypatch, cap, window):
    """As one graph for rows of any length, as on CUDA; code for it is generated there alone."""
    torch._dynamo.reset()
    compiled = torch.compile(attention.flex_attention, dynamic=True, fullgraph=True, backend="eager")
    monkeypatch.setattr(attention, "flex_attention", compiled)
    plain, prefix_mask = [one.detach() for one in tensors(2)], SharedPrefixMask(TREES, torch.device("cpu"))
    found = attention._by_flex(*plain, prefix_mask.block_mask(window), 0.3, cap).transpose(1, 2)
    assert torch.allclose(found, expected(*plain, window, cap, 0.3), atol=1e-12)


def test_as_many_variants_are_compiled_in_every_thread():
    """PyTorch's setting is that of the thread that sets it; a backward pass on CUDA has a thread of its own."""
    attention._compiled()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(attention._compiled).result()
        limit = thread.submit(lambda: torch._dynamo.config.recompile_limit).result()
    assert limit == torch._dynamo.config.recompile_limit == attention.VARIANTS
