"""What is compared when a change must move no number."""

import json

import pytest
from same_numbers import differences


def run(folder, **changes):
    """A run of two steps."""
    (folder / "beta=0.1/policy").mkdir(parents=True)
    rows = [{"step": 1, "loss": 0.7, "items_per_second": 3.0}, {"step": 2, "loss": changes.get("loss", 0.6)}]
    text = "".join(json.dumps(row) + "\n" for row in rows[: changes.get("rows", 2)])
    (folder / "beta=0.1/config.yaml").touch()
    (folder / "beta=0.1/metrics.jsonl").write_text(text)
    (folder / "beta=0.1/evaluation.json").write_text(
        json.dumps({"kl": changes.get("kl", 1.0), "seconds": changes.get("seconds", 1.0)})
    )
    (folder / "beta=0.1/responses.jsonl").write_text(json.dumps({"response": changes.get("response", "a")}) + "\n")
    (folder / "beta=0.1/policy/model.safetensors").write_bytes(changes.get("weights", b"\0\1"))


@pytest.mark.parametrize(
    "change,said",
    [
        ({"loss": 0.6000000000000001}, ["metrics.jsonl, row 2, loss: 0.6 then, 0.6000000000000001 now"]),
        ({"kl": None}, ["evaluation.json, row 1, kl: 1.0 then, None now"]),
        ({"response": "b"}, ["responses.jsonl, row 1, response: a then, b now"]),
        ({"weights": b"\0\2"}, ["policy/model.safetensors"]),
        ({"rows": 1}, [f"metrics.jsonl, row 2, {key} then, nothing now" for key in ("step: 2", "loss: 0.6")]),
        ({"seconds": 9.0}, []),
    ],
)
def test_what_differs_is_named(tmp_path, change, said):
    run(tmp_path / "sweep")
    run(tmp_path / "now", **change)
    assert differences(tmp_path / "sweep", tmp_path / "now") == [f"sweep/beta=0.1: {line}" for line in said]


def test_a_run_that_is_missing_differs(tmp_path):
    run(tmp_path / "sweep")
    (tmp_path / "now").mkdir()
    assert any(line.endswith("kl: 1.0 then, nothing now") for line in differences(tmp_path / "sweep", tmp_path / "now"))
    assert differences(tmp_path / "now", tmp_path / "now") == ["now: no run"]
