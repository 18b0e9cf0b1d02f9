"""Which policy a run keeps."""

import math

import pytest
import torch
from whole_runs import own, run

from dpo import evaluate
from dpo.policy import model as models
from dpo.policy.best import BestCheckpoint


@pytest.fixture
def policy(tiny_model):
    return models.load(tiny_model("llama"))


def marked(policy, value: float):
    """The policy with a weight by which it can be told."""
    with torch.no_grad():
        policy.lm_head.weight.fill_(value)
    return policy


def mark(folder) -> float:
    return models.load(str(folder))[0].lm_head.weight[0, 0].item()


def test_the_lowest_loss_is_kept(tmp_path, policy):
    model, tokenizer = policy
    selection = BestCheckpoint(tmp_path)
    for step, loss in ((10, 0.6), (20, 0.5), (30, 0.7), (40, 0.5)):
        selection.update(step, {"loss": loss, "step": step}, marked(model, step), tokenizer)
    assert (selection.step, selection.metrics) == (20, {"loss": 0.5, "step": 20})
    assert [path.name for path in (tmp_path / "selected").glob("step-*")] == ["step-20"]
    selection.finalize(tmp_path / "policy")
    assert mark(tmp_path / "policy") == 20
    selection.finalize(tmp_path / "policy")  # as after a stop in between
    assert mark(tmp_path / "policy") == 20


def test_a_run_that_resumes_knows_its_best(tmp_path, policy, monkeypatch):
    model, tokenizer = policy
    BestCheckpoint(tmp_path).update(20, {"loss": 0.5}, marked(model, 20), tokenizer)
    again = BestCheckpoint(tmp_path)
    again.update(20, {"loss": 0.5}, marked(model, 21), tokenizer)  # comes by there once more, with other rounding
    again.update(30, {"loss": 0.6}, marked(model, 30), tokenizer)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "of another attempt").touch()
    again.finalize(tmp_path / "policy")
    assert not (tmp_path / "policy" / "of another attempt").exists()
    assert (again.step, mark(tmp_path / "policy")) == (20, 21)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # stopped while a better one is written: the former counts
        patch.setattr(models, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            BestCheckpoint(tmp_path).update(40, {"loss": 0.1}, model, tokenizer)
    later = BestCheckpoint(tmp_path)
    later.update(30, {"loss": 0.6}, model, tokenizer)  # the best step is behind it
    assert (later.step, later.metrics) == (20, {"loss": 0.5})


def test_a_run_keeps_the_step_of_lowest_validation_loss(tmp_path, tiny_model, monkeypatch):
    """Losses are made up for the evaluated steps 0, 1, 2, 3 and 4."""
    made_up = iter([0.1, 0.9, 0.3, 0.5, 0.4])
    on_pairs = evaluate.on_pairs
    monkeypatch.setattr(evaluate, "on_pairs", lambda *given: on_pairs(*given) | {"loss": next(made_up)})
    measure, measured = evaluate.measure, []
    noted = lambda policy, *more: measured.append(models.fingerprint(policy)) or measure(policy, *more)  # noqa: E731
    monkeypatch.setattr(evaluate, "measure", noted)
    given = [*own(tmp_path, tiny_model("llama")), "steps=4", "evaluate_every=1"]
    _, result = run(tmp_path / "best", *given, "keep=best")
    assert measured == [models.fingerprint(models.load(str(tmp_path / "best" / "policy"))[0])]
    assert (result["selected_step"], result["steps"], result["loss"]) == (2, 4, 0.3)
    assert not (tmp_path / "best" / "selected").exists()
    monkeypatch.undo()
    rows, result = run(tmp_path / "last", *given)
    assert result["selected_step"] == 4
    assert result["loss"] == [row["loss"] for row in rows if row["split"] == "validation"][-1]


@pytest.mark.parametrize("keep", ["last", "best"])
def test_no_steps_measure_the_initial_policy(tmp_path, tiny_model, keep):
    rows, result = run(tmp_path / "run", *own(tmp_path, tiny_model("llama")), "steps=0", f"keep={keep}")
    assert (result["steps"], result["selected_step"]) == (0, 0)
    assert result["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert result["kl"] == pytest.approx(0, abs=1e-6)
    assert not any(row["split"] == "train" for row in rows)
    before, after = (models.load(path)[0] for path in (tiny_model("llama"), str(tmp_path / "run" / "policy")))
    assert models.fingerprint(before) == models.fingerprint(after)
