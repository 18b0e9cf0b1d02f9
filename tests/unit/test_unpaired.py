"""Single responses with a label, from the file to KTO's loss: against TRL's own code, brute force and closed forms."""

import math
import random
import types
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial

import datasets
import pytest
import torch
from conftest import CHAT_TEMPLATE, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import config
from test_coupled import gradient, loss_of, pairs
from test_hub import save

from dpo.data.batches import Pair, brief, collate_pairs, mismatched, tokenize
from dpo.data.hub import unpaired
from dpo.data.records import Preference, TokenIds, contents
from dpo.data.tokens import vocabulary
from dpo.data.treatment import Treatment, treat
from dpo.losses import PairLogps, dpo, kto
from dpo.losses.pairs import metrics, reads, try_out
from dpo.score import tokenized
from dpo.sweep.rehearse import trials

BETA = 0.3


def line(number, label, **other):
    return {"prompt": f"Is {number} even?", "completion": f" It is {label}.", "label": label, **other}


ROWS = [line(n, n % 3 == 0) for n in range(60)]


def read(path, rows, rule="error", **options):
    return unpaired(save(path / "rows.jsonl", rows), None, "none", 0.2, rule)


# From rows to a data set


def test_rows_become_responses_with_a_label(tmp_path):
    """true or 1, false or 0; demonstrations are the desirable ones of the training split."""
    rows = [*ROWS[:50], *(row | {"label": int(row["label"])} for row in ROWS[50:])]
    data = read(tmp_path, rows)
    found = {pair.prompt: pair for some in data.preferences.values() for pair in some}
    assert len(found) == 60
    for row in rows:
        pair = found[row["prompt"]]
        assert pair == Preference(row["prompt"], row["completion"], row["completion"], label=bool(row["label"]))
    train = data.preferences["train"]
    assert [one.prompt for one in data.demonstrations] == [pair.prompt for pair in train if pair.label]
    assert {one.response for one in data.demonstrations} == {" It is True."}
    assert data.prompts["test"] == [pair.prompt for pair in data.preferences["validation"]]
    with pytest.raises(ValueError, match="what a human responds to each of the test prompts"):
        data.written_to(data.prompts["test"], "test")
    turned = [row | {"label": not row["label"]} for row in rows[:1]] + rows[1:]
    assert contents(read(tmp_path, turned)) != contents(data)


def test_a_human_answers_where_each_prompt_has_a_desirable_response(tmp_path):
    both = [line(n, label) for n in range(20) for label in (False, True)]
    data = read(tmp_path, both)
    assert data.written_to(data.prompts["test"], "test") == [" It is True."] * len(data.prompts["test"])


def test_chats(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "label": row["label"],
        }
        for row in ROWS
    ]
    data = read(tmp_path, rows)
    assert data.preferences["train"][0].chosen == [{"role": "assistant", "content": " It is False."}]
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.chat_template = CHAT_TEMPLATE
    [pair] = tokenize(data.preferences["train"][:1], tokenizer, 200, "error")
    text = tokenizer.decode(pair.prompt_ids + pair.chosen_ids)
    assert text.endswith("<|im_start|>assistant\n It is False.<|im_end|>")
    assert pair.label is False


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"label": "true"}, "label must be true or false, or 1 or 0, found 'true'"),
        ({"label": 2}, "found 2"),
        ({"label": None}, "found None"),
        ({"label": 1.0}, r"found 1\.0"),
        ({"completion": 3}, "completion must be text or a list of chat messages, found a number"),
        ({"completion": [{"role": "assistant", "content": "a"}]}, "completion is chat messages, so prompt must be"),
        ({"completion_ended": 1}, "completion_ended must be true or false"),
        ({"tools": [{}]}, "must say all that the policy reads in prompt, found tools"),
    ],
)
def test_what_is_no_labelled_response(tmp_path, wrong, said):
    with pytest.raises(ValueError, match=f"1 of 60 lines are no records:\n  line 2: .*{said}"):
        read(tmp_path, [ROWS[0], ROWS[1] | wrong, *ROWS[2:]])


def test_keys_that_are_missing(tmp_path):
    with pytest.raises(
        ValueError, match="line 1: must have prompt, completion and label; found no completion and no l"
    ):
        read(tmp_path, [{"prompt": "p"}])
    with pytest.raises(ValueError, match="found no completion and no label; lines with prompt, chosen and rejected"):
        read(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b"}])


@pytest.mark.parametrize("label", [True, False])
def test_one_label_alone_is_refused(tmp_path, label):
    with pytest.raises(ValueError, match=f"must have training responses of both labels, found {label} alone"):
        read(tmp_path, [line(n, label) for n in range(20)])


def test_empty_responses_are_faulty(tmp_path, capsys):
    rows = [*ROWS, line(60, True, completion=" "), line(61, False, completion_ended=False)]
    with pytest.raises(ValueError, match=r"1 of 62 responses are faulty:\n  line 61: completion is empty"):
        read(tmp_path, rows)
    data = read(tmp_path, rows, "drop")
    assert sum(map(len, data.preferences.values())) == 61
    assert "1 x completion is empty" in capsys.readouterr().out
    [cut] = [pair for some in data.preferences.values() for pair in some if not pair.chosen_ended]
    assert (cut.prompt, cut.rejected_ended) == ("Is 61 even?", False)


def test_from_the_hub(dataset_hub):
    dataset_hub.publish("some/repository", {"train.jsonl": ROWS[:40], "test.jsonl": ROWS[40:]})
    data = unpaired(None, None, "some/repository", 0.1, "error")
    assert [len(data.preferences[split]) for split in ("train", "validation")] == [40, 20]
    assert data.preferences["validation"][1].source == "some/repository, test split, row 1"


def test_splits_and_configurations(tmp_path, dataset_hub):
    """A folder of a train split alone, and names for any other; of the hub a configuration, too."""
    folder = tmp_path / "copy"
    folder.mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"test split must be readable, found: .*test"):
        unpaired(str(folder), None, "none", 0.2, "error")
    data = unpaired(str(folder), None, "none", 0.2, "error", split="train")
    alone = read(tmp_path, ROWS)
    for name in ("train", "validation"):
        assert data.preferences[name] == alone.preferences[name]
    datasets.Dataset.from_list(ROWS[:9]).to_parquet(folder / "validation-00000-of-00001.parquet")
    named = unpaired(str(folder), None, "none", 0.2, "error", validation_split="validation")
    assert [len(named.preferences[name]) for name in ("train", "validation")] == [60, 9]
    shown = unpaired(str(tmp_path / "rows.jsonl"), str(folder), "none", 0.2, "error", validation_split="validation")
    assert shown.preferences["validation"] == named.preferences["validation"]
    configs = "".join(f"- config_name: {one}\n  data_dir: {one}\n" for one in ("easy", "hard"))
    files = {f"{one}/{split}.jsonl": some for one, rows in (("easy", ROWS[:40]), ("hard", ROWS)) for split, some in
             (("train", rows[9:]), ("test", rows[:9]))}  # fmt: skip
    dataset_hub.publish("some/responses", files | {"README.md": f"---\nconfigs:\n{configs}---\n"})
    dataset_hub.publish("some/others", {"all.jsonl": ROWS, "test.jsonl": ROWS[:7]}, "v1")
    for name, count in (("easy", 31), ("hard", 51)):
        data = unpaired("some/responses", None, "none", 0.2, "error", config=name)
        assert [len(data.preferences[split]) for split in ("train", "validation")] == [count, 9]
    data = unpaired(str(tmp_path / "rows.jsonl"), "some/others@v1", "none", 0.2, "error")
    assert [len(data.preferences[name]) for name in ("train", "validation")] == [60, 7]


def test_flips_turn_labels_and_what_needs_pairs_is_refused(tmp_path):
    train = read(tmp_path, ROWS).preferences["train"]
    turned = treat(train, Treatment(flip=1.0), 0)
    assert [pair.label for pair in turned] == [not pair.label for pair in train]
    assert [(pair.prompt, pair.chosen) for pair in turned] == [(pair.prompt, pair.chosen) for pair in train]
    with pytest.raises(ValueError, match=r"pairs\.outliers takes pairs, found single responses"):
        treat(train, Treatment(outliers=0.5), 0)
    for other in (Treatment(gap="low"), Treatment(label_temperature=1.0)):
        with pytest.raises(ValueError, match="takes pairs"):
            treat(train, other, 0)


# A response to another prompt beside each


TOKENIZER = tiny_tokenizer("llama")


def single(prompt, response, label=True, **other):
    """A row in tokens, its text made up."""
    text = Preference(str(prompt), str(response), str(response), label=label, **other)
    return Pair(prompt, response, response, text)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_each_response_comes_to_one_other_prompt(counts, rng):
    """Whatever the order of the rows and however many share a prompt."""
    rows = [single([prompt], [10 * prompt + n]) for prompt, count in enumerate(counts) for n in range(count)]
    rng.shuffle(rows)
    if 2 * max(counts) > len(rows):
        with pytest.raises(ValueError, match=rf"at most half may have the same prompt.* found {max(counts)} of "):
            mismatched(rows, TOKENIZER, 100, "train pairs")
        return
    found = mismatched(rows, TOKENIZER, 100, "train pairs")
    assert [(one.prompt_ids, one.chosen_ids, one.label) for one in found] == [
        (row.prompt_ids, row.chosen_ids, True) for row in rows
    ]
    assert Counter(one.rejected_ids[0] for one in found) == Counter(row.chosen_ids[0] for row in rows)
    assert all(one.rejected_ids[0] // 10 != one.prompt_ids[0] for one in found)
    assert all(one.text.rejected == str(one.rejected_ids) for one in found)


def test_which_response_it_is_goes_by_the_content():
    rows = [single([prompt], [prompt]) for prompt in range(12)]
    shuffled = rows.copy()
    random.Random(0).shuffle(shuffled)
    first, second = (
        {one.prompt_ids[0]: one.rejected_ids for one in mismatched(some, TOKENIZER, 9, "")} for some in (rows, shuffled)
    )
    assert first == second
    assert [first[prompt] for prompt in range(12)] != [[(prompt + 1) % 12] for prompt in range(12)]  # but no neighbour


def test_where_it_has_no_room_it_is_cut(capsys):
    long = tokenize(
        [Preference("Hi", " the capital of Italy is Rome, you know", " no", label=True)], TOKENIZER, 99, "error"
    )
    short = tokenize([Preference("Tell me about cats and dogs", " no", " no", label=False)], TOKENIZER, 99, "error")
    room = len(short[0].prompt_ids) + 3
    found = mismatched([*long, *short], TOKENIZER, room, "train pairs")
    assert found[1].rejected_ids == long[0].chosen_ids[:3]
    assert found[1].text.rejected == TOKENIZER.decode(long[0].chosen_ids[:3])
    assert (found[1].text.rejected_ended, found[0].text.rejected_ended) == (False, True)
    assert (found[1].cut, found[0].cut) == (("rejected",), ())
    assert found[0].rejected_ids == short[0].chosen_ids
    said = capsys.readouterr().out
    assert f"1 desirable and 1 undesirable responses, of which 1 are cut to {room} tokens beside another" in said


def test_what_is_cut_is_told_of_each_response(tmp_path):
    """By on_too_long=truncate, of the response and of the one that comes beside it."""
    limits = types.SimpleNamespace(max_length=8, on_too_long="truncate")
    pairs = [Preference("Hi", " the capital of Italy is Rome, you know", " no"), Preference("H", " yes", " never")]
    turned = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    expected = {
        " the capital of Italy is Rome": ("prompt", "chosen"),
        " no": ("prompt",),
        " yes": ("rejected",),  # of the first
        " never": (),
    }
    for some in (pairs, turned):
        made = tokenized({"train": some}, TOKENIZER, limits, "error", True, str(tmp_path))["train"]
        assert {one.text.chosen: one.cut for one in made} == expected


def test_a_pair_is_two_responses(tmp_path):
    """Its chosen one is desirable; what a policy sampled keeps its token ids."""
    given = [Preference(f"Is {n} even?", f" yes {n}", f" no {n}", n != 2, True) for n in range(6)]
    made = tokenized(
        {"train": given},
        TOKENIZER,
        types.SimpleNamespace(max_length=99, on_too_long="error"),
        "error",
        True,
        str(tmp_path),
    )
    assert [(one.text.prompt, one.text.chosen, one.text.chosen_ended, one.label) for one in made["train"]] == [
        row
        for n in range(6)
        for row in ((f"Is {n} even?", f" yes {n}", n != 2, True), (f"Is {n} even?", f" no {n}", True, False))
    ]
    plain = tokenize(given, TOKENIZER, 99, "error")
    assert [one.chosen_ids for one in made["train"]] == [
        ids for pair in plain for ids in (pair.chosen_ids, pair.rejected_ids)
    ]
    for one in made["train"]:
        assert one.text.prompt.split()[1] != one.text.rejected.split()[1]
    same = [*given, Preference("Is 7 even?", " yes", " yes")]
    with pytest.raises(ValueError, match="chosen and rejected have the same tokens"):
        tokenized(
            {"train": same},
            TOKENIZER,
            types.SimpleNamespace(max_length=99, on_too_long="error"),
            "error",
            True,
            str(tmp_path),
        )


def test_what_is_too_long_is_called_a_response(tmp_path):
    limits = types.SimpleNamespace(max_length=3, on_too_long="error")
    for label, called in ((True, "responses"), (None, "pairs")):
        long = [Preference("Is 7 even or odd?", " yes", " no" if label is None else " yes", label=label)]
        with pytest.raises(ValueError, match=f"1 of 1 train {called} have more than 3 tokens"):
            tokenized({"train": long}, TOKENIZER, limits, "error", True, str(tmp_path))


def test_sampled_ids_stay_with_their_response():
    own = vocabulary(TOKENIZER)
    rows = []
    for n, text in enumerate((" cats", " dogs", " Rome")):
        prompt, eos = TOKENIZER(f"{n}?")["input_ids"], TOKENIZER.eos_token_id
        letters = [TOKENIZER.convert_tokens_to_ids("Ġ"), *map(TOKENIZER.convert_tokens_to_ids, text.strip())]
        ids = TokenIds(own, prompt, [*letters, eos], [*letters[:1], *letters, eos])
        rows.append(Preference(f"{n}?", text, " " + text, token_ids=ids))
    made = mismatched(tokenize(rows, TOKENIZER, 99, "error"), TOKENIZER, 99, "train pairs")
    sides = [(ids.chosen, ids.rejected) for ids in (row.token_ids for row in rows)]
    assert [one.chosen_ids for one in made] == [ids for both in sides for ids in both]
    for one in made:
        assert (one.text.token_ids.chosen, one.text.token_ids.rejected) == (one.chosen_ids, one.rejected_ids)


def test_batches_know_the_labels():
    index, real = torch.arange(3), torch.ones(3, dtype=torch.bool)
    some = [single([5], [6, 7], True), single([5], [8], False), single([9], [4], False)]
    for packed in (True, False):
        batch = collate_pairs(some, index, real, pad_id=0, packed=packed)
        assert batch.desirable.tolist() == [True, False, False]
        assert batch.to("cpu").desirable.tolist() == [True, False, False]
        assert brief(some).startswith("data: 3 training responses, the longest of 3 tokens;")
        plain = [replace(one, text=None) for one in some]
        assert brief(plain).startswith("data: 3 training pairs")
        assert collate_pairs(plain, index, real, pad_id=0, packed=packed).desirable is None


# The loss


def by_trl(pair, desirable_weight, undesirable_weight):
    """Loss and metrics by TRL's own method, on models that give these log-probs, one token each."""
    with warnings.catch_warnings():  # and here, since it takes long to import
        warnings.simplefilter("ignore")
        from trl.trainer.kto_trainer import KTOTrainer

    logged = {"train": {name: [] for name in NAMES}}
    accelerator = types.SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value)
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=accelerator,
        _metrics=logged,
        _compute_kl_logps=lambda *_: pair.policy_rejected_logps,
        **{"beta": BETA, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight},
        **{"calculate_KL": True, "precompute_ref_logps": True, "aux_loss_enabled": False, "loss_type": "kto"},
        **{"_total_train_tokens": 0, "_tp_size": 1},
    )
    shape = (len(pair.desirable), 2)
    mask = torch.tensor([0, 1]).expand(shape)
    inputs = {"label": pair.desirable, "completion_mask": mask, "input_ids": torch.zeros(shape, dtype=torch.long)}
    inputs |= {"attention_mask": mask, "ref_logps": pair.reference_chosen_logps}
    inputs |= {"ref_KL_logps": pair.reference_rejected_logps}
    none = torch.zeros(shape[0], 1)
    said = types.SimpleNamespace(log_probs=pair.policy_chosen_logps[:, None], entropy=none, mean_logits=none)
    found = KTOTrainer._compute_loss(trainer, lambda **_: said, inputs, return_outputs=False)
    return found, {name: values[-1] for name, values in logged["train"].items() if values}


NAMES = ("kl", "entropy", "num_tokens", "logits/chosen", "logits/rejected", "rewards/chosen", "rewards/rejected")
NAMES += ("rewards/margins", "logps/chosen", "logps/rejected")


@pytest.mark.parametrize("shift", [-40.0, 5.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.7)])
def test_trl_computes_the_same(shift, weights):
    """The loss, its gradient and what is logged, with a z of 0 and above."""
    pair = pairs(12, seed=3, labels=True)
    pair = replace(pair, reference_rejected_logps=pair.policy_rejected_logps - shift - torch.randn(12).double())
    loss = partial(kto, beta=BETA, desirable_weight=weights[0], undesirable_weight=weights[1])
    losses, slopes = gradient(loss, pair)
    leaf = replace(pair, policy_chosen_logps=pair.policy_chosen_logps.clone().requires_grad_())
    theirs, logged = by_trl(leaf, *weights)
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-9)
    [exact] = torch.autograd.grad(theirs * len(losses), leaf.policy_chosen_logps)
    assert torch.allclose(slopes[0], exact, rtol=1e-9, atol=0)
    assert not slopes[1].any()
    mine = {name: value.mean().item() for name, value in metrics(pair, loss(pair)).items()}
    shared = {name for name in logged if name in mine}
    assert shared == {
        "kl",
        *(f"{what}/{side}" for what in ("rewards", "logps") for side in ("chosen", "rejected")),
        "rewards/margins",
    }
    assert {name: mine[name] for name in shared} == pytest.approx({name: logged[name] for name in shared})
    assert (mine["kl"] > 0) is (shift > 0)


def test_at_equal_models_it_is_half_the_weight():
    """z = 0, so that each loss is its weight times s(0), and its slope beta / 4 times the weight, by the label."""
    logps = torch.tensor([-5.0, -80.0, -3.0, -40.0], dtype=torch.float64)
    pair = PairLogps(*[logps] * 4, *torch.ones(2, 4), desirable=torch.tensor([True, False, False, True]))
    losses, slopes = gradient(loss_of("kto", beta=BETA, desirable_weight=1.5, undesirable_weight=0.5), pair)
    assert losses.tolist() == [0.75, 0.25, 0.25, 0.75]
    assert slopes[0].tolist() == pytest.approx([-1.5 * BETA / 4, 0.5 * BETA / 4, 0.5 * BETA / 4, -1.5 * BETA / 4])
    assert loss_of("kto")(pair).losses.tolist() == [0.5] * 4


def test_by_hand():
    """Log-ratios 1 and -2 of a desirable and an undesirable response, 5 and -1 of those beside them: z = 2."""
    ours, zeros = torch.tensor([[1.0, -2.0], [5.0, -1.0]], dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    pair = PairLogps(*ours, *zeros, *torch.tensor([[4, 6], [1, 1]]), desirable=torch.tensor([True, False]))
    found = kto(pair, 0.5, 1.0, 2.0)
    assert found.losses.tolist() == pytest.approx(
        [1 / (1 + math.exp(0.5 * (1 - 2))), 2 / (1 + math.exp(0.5 * (2 + 2)))]
    )
    assert {name: value.tolist() for name, value in metrics(pair, found).items()} == {
        **{"rewards/chosen": [0.5] * 2, "rewards/rejected": [-1.0] * 2, "rewards/margins": [1.5] * 2, "kl": [2.0] * 2},
        **{"logps/chosen": [1.0] * 2, "logps/rejected": [-2.0] * 2, "lengths/chosen": [4.0] * 2},
        **{"logratios/chosen": [1.0] * 2, "logratios/rejected": [-2.0] * 2, "logratios/margins": [3.0] * 2},
        **{"lengths/rejected": [6.0] * 2, "logratios/mismatched": [2.0] * 2},
    }


@pytest.mark.parametrize("label, there, absent", [(True, "chosen", "rejected"), (False, "rejected", "chosen")])
def test_a_step_of_one_label_has_no_figure_of_the_other(label, there, absent):
    pair = replace(pairs(5), desirable=torch.full((5,), label))
    logged = metrics(pair, loss_of("kto")(pair))
    assert {name for name in logged if name.endswith(there)} == {
        f"{of}/{there}" for of in ("rewards", "logps", "logratios", "lengths")
    }
    assert not {name for name in logged if name.endswith((absent, "margins"))}


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, -1.0)])
def test_weights_must_be_above_0(weights):
    with pytest.raises(ValueError, match="weights must be above 0"):
        try_out(loss_of("kto", desirable_weight=weights[0], undesirable_weight=weights[1]))
    try_out(loss_of("kto"))


def test_a_loss_is_tried_on_both_labels():
    @reads("labels")
    def broken(pair):
        [desirable] = pair.asked("labels")
        found = dpo(pair, BETA, 0.0)
        return replace(found, losses=torch.where(desirable, found.losses, torch.inf))

    with pytest.raises(ValueError, match="must be finite"):
        try_out(broken)


# What is planned


def test_data_and_loss_must_fit(tmp_path, tiny_model):
    """A loss of pairs cannot learn from single responses; commands that read prompts alone can."""
    given = [f"policy.path={tiny_model('llama')}", "data.validation_fraction=0.2"]
    given += [f"data.path={save(tmp_path / 'rows.jsonl', ROWS)}", "data=unpaired"]
    fits, not_pairs = trials([config(*given, "loss=kto"), config(*given)])
    assert fits["problems"] == []
    assert "dpo.losses.dpo learns from pairs, found data of single responses with a label" in not_pairs["problems"][0]
    assert trials([config(*given) | {"command": "generate"}])[0]["problems"] == []
    written = save(tmp_path / "pairs.jsonl", [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(9)])
    own = [*given[:2], f"data.path={written}", "data=file", "loss=kto"]
    assert trials([config(*own)])[0]["problems"] == []


def test_a_split_of_one_prompt_is_refused_when_planned(tmp_path, tiny_model):
    """Whether it is the held-out one or not; pairs can be learned from by other losses, and prompts sampled for."""
    many, one, two, three = (
        [{"prompt": f"{n % prompts}", "chosen": "a", "rejected": "b"} for n in range(9)] for prompts in (9, 1, 2, 3)
    )
    rows = {"many": many, "one": one, "two": two, "three": three}
    paths = [save(tmp_path / f"{name}.jsonl", some) for name, some in rows.items()]

    def problems(train, held_out, *given, **more):
        data = [f"data.path={paths[train]}", f"data.validation_path={paths[held_out]}", "data=file"]
        return trials([config(f"policy.path={tiny_model('llama')}", *data, *given) | more])[0]["problems"]

    for sides, found in {(0, 1): "validation pairs", (1, 0): "train pairs", (0, 2): "validation pairs"}.items():
        [problem] = problems(*sides, "loss=kto")  # two prompts are those of 5 and 4 rows
        assert f"of {found} at most half may have the same prompt" in problem
        assert f"found {5 if 2 in sides else 9} of 9. Add responses" in problem
        assert problems(*sides) == problems(*sides, "loss=kto", command="generate") == []
    assert problems(0, 3, "loss=kto") == []
