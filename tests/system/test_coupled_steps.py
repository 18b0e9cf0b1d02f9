"""Losses of conf/loss that couple the step: dealt out in any way, on one process or several, stopped and resumed."""

import pytest
import test_whole_step as steps
import torch
from omegaconf import OmegaConf
from ranks import together
from test_whole_step import BETA, LAYOUTS, ROOT, STEPS, brute_force, close, rows_of, weights
from whole_runs import frozen as frozen_config
from whole_runs import own

from dpo.losses.pairs import unbound
from dpo.sweep.signature import instantiate
from dpo.training import distributed

LOSSES = {  # options of a page, in ways that matter to how a step is dealt out
    "beta_dpo": {},
    "beta_dpo-code": {"scale": "logratio", "order": "code", "keep": 0.5, "alpha": 0.1},
    "beta_dpo-instance": {"level": "instance", "filter": "head_tail"},
    "beta_ipo-gradient": {"filter": "head", "filter_by": "gradient"},
    "beta_kto": {},
    "beta_simpo": {},
    "dr_dpo": {"beta_prime": 0.5},
    "alpha_dpo": {},
    "aot": {},
    "aot_unpaired": {},
    "kto": {"desirable_weight": 1.5},
    "kto_paired": {},
    "bco": {},
}
STATEFUL = ("beta_dpo-code", "alpha_dpo", "bco")
OF_FOUR = ("beta_dpo-code", "aot", "kto")


def loss_of(name):
    page = OmegaConf.load(ROOT / "conf" / "loss" / f"{name.partition('-')[0]}.yaml")
    node = OmegaConf.to_container(OmegaConf.create({"seed": 3, "loss": page}), resolve=True)["loss"]
    return instantiate({**node, "beta": BETA, **LOSSES[name]})


def train(directory, name, micro_batches=4, **options):
    return steps.train(directory, name, micro_batches, loss=loss_of(name), **options)


def state(loss):
    module = unbound(loss)
    return module.state_dict() if isinstance(module, torch.nn.Module) else {}


def several_processes(directory):
    distributed.join("cpu")
    four = distributed.world_size() == 4
    for name in OF_FOUR if four else LOSSES:
        model, loss, _ = train(directory / name, name)
        full = weights(model)
        if distributed.is_main():
            torch.save(full, directory / f"{name}.pt")
        torch.save(state(loss), directory / f"{name}-{distributed.rank()}.pt")
    for name in () if four else STATEFUL:
        train(directory / f"{name}-resumed", name, steps=3)
        train(directory / f"{name}-resumed", name)
    distributed.leave()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {
        (name, number): (folder / f"{name}-{number}", *train(folder / f"{name}-{number}", name, number))
        for name in LOSSES
        for number in LAYOUTS
    }


@pytest.fixture(scope="module")
def expected():
    return {name: brute_force(loss_of(name)) for name in LOSSES}


@pytest.fixture(scope="module", params=[2, 4])
def several(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("several")
    together(several_processes, directory, processes=request.param)
    return request.param, directory


def same_state(found, exact):
    assert found.keys() == exact.keys()
    for key, value in found.items():
        assert value.item() == pytest.approx(exact[key].item(), rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("number", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_any_micro_batches_are_all_pairs_at_once(one, expected, name, number):
    directory, model, loss, _ = one[name, number]
    close(directory, weights(model), expected[name])
    same_state(state(loss), state(expected[name][2]))


@pytest.mark.long
def test_any_processes_are_all_pairs_at_once(several, expected):
    """With the same state on each of them, to the bit."""
    processes, directory = several
    for name in OF_FOUR if processes == 4 else LOSSES:
        close(directory / name, torch.load(directory / f"{name}.pt"), expected[name])
        first, *others = (torch.load(directory / f"{name}-{rank}.pt") for rank in range(processes))
        same_state(first, state(expected[name][2]))
        assert all(torch.equal(value, other[key]) for other in others for key, value in first.items())
    if processes == 2:
        for name in STATEFUL:
            assert rows_of(directory / f"{name}-resumed") == rows_of(directory / name)


@pytest.mark.parametrize("name", STATEFUL)
def test_stopped_and_resumed_is_the_whole_run(one, tmp_path, name):
    whole, model, loss, _ = one[name, 4]
    train(tmp_path / "run", name, steps=3)
    again, resumed, _ = train(tmp_path / "run", name)
    assert rows_of(tmp_path / "run") == rows_of(whole)
    assert all(torch.equal(value, weights(model)[key]) for key, value in weights(again).items())
    assert all(torch.equal(value, state(loss)[key]) for key, value in state(resumed).items())


def test_what_a_step_reports(one):
    """The share of pairs that are kept is of all micro-batches: 11 of 14, then 4 of 5."""
    rows = rows_of(one["beta_dpo", 14][0])
    assert [row["kept"] for row in rows] == pytest.approx([11 / 14, 11 / 14, 4 / 5, 11 / 14, 11 / 14])
    assert len({row["beta"] for row in rows}) == STEPS
    assert "rewards/shift" in rows_of(one["bco", 1][0])[0]


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(["loss.filter=head", "loss.keep=0.5"], marks=pytest.mark.long),
        pytest.param(["loss.scale=logratio", "loss.order=code"], marks=pytest.mark.long),
    ],
)
def test_a_whole_run_with_a_reference_that_moves(tmp_path, tiny_model, monkeypatch, options):
    """From a policy equal to it on: in one micro-batch or several, stopped and resumed, often validated or not."""
    moving = ["reference=ema", "reference.every=1", "reference.alpha=0.3", "loss=beta_dpo", *options]
    given = [*own(tmp_path, tiny_model("llama")), *moving, "evaluation.prompts=2", "evaluation.log_samples=0"]
    given += ["checkpoint_every=1", "evaluate_every=1", "steps=4"]
    rows = steps.dealt_out_in_every_way(tmp_path, lambda at, *more: frozen_config(at, *given, *more), monkeypatch)
    trained = {name: [row for row in some if row["split"] == "train"] for name, some in rows.items()}
    assert trained["rare"] == trained["whole"]
    assert all(0 < row["kept"] < 1 for row in trained["whole"])
    for mine, theirs in zip(rows["small"], rows["whole"], strict=True):
        assert mine.pop("split") == theirs["split"]
        assert mine == pytest.approx({key: theirs[key] for key in mine}, rel=2e-3, abs=1e-4)
