"""A run writes its policy's model card, the policy generates in transformers as it is, and goes to a hub as asked."""

import base64
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from omegaconf import OmegaConf
from whole_runs import frozen, own

from dpo import sft, train
from dpo.data.records import contents
from dpo.policy import model as models
from dpo.push import push
from dpo.results import card as cards
from dpo.sweep.signature import instantiate

ROOT = Path(__file__).parents[2]
SECRET = "hf_thetokenofatest"
KINDS = {"weights": [], "adapters": ["policy.lora.rank=4", "lr=1e-2"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model) -> Path:
    """Finished runs of all weights and of adapters, as a sweep leaves them, with what their configs record."""
    folder = tmp_path_factory.mktemp("pushed")
    shutil.copytree(tiny_model("qwen2"), folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
            patch.setenv(name, SECRET)
        for name, more in KINDS.items():
            (folder / name).mkdir()
            config = frozen(folder / name, *own(folder, str(folder / "base")), *more, "evaluation.prompts=20")
            data = contents(instantiate(config.data))
            config.choices = {"loss": "dpo", "reference": "initial", "data": "file", "judge": "none"}
            config.provenance = {"commit": "0" * 40, "python": "3.11", "inputs": {"data": data}}
            (folder / name / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
            train.run(config, folder / name)
    return folder


def card(run: Path) -> str:
    return (run / "policy" / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_card_says(runs, kind):
    """Each figure is that of `evaluation.json`, its interval by hand, and the digests are those of the weights."""
    run, text = runs / kind, card(runs / kind)
    evaluation = json.loads((run / "evaluation.json").read_text())
    table = {row[0]: row[1:] for row in re.findall(r"^\| (.+?) \| (\S+) \| (?:\[(\S+), (\S+)\])? \|$", text, re.M)}
    kl, error = evaluation["kl"], evaluation["kl/se"]
    found = table["KL(policy \\|\\| policy before training), nats per response"]
    assert [float(one) for one in found] == pytest.approx([kl, kl - 1.96 * error, kl + 1.96 * error], rel=2e-3)
    share, n, z = evaluation["rewards/accuracies"], 9, 1.96
    middle, half = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    wilson = [max(0.0, (middle - half) / (1 + z**2 / n)), min(1.0, (middle + half) / (1 + z**2 / n))]
    found = table["accuracy of the implicit reward on held-out pairs"]
    assert [float(one) for one in found] == pytest.approx([share, *wilson], abs=2e-3)
    digest = models.fingerprint(models.load(str(runs / "base"))[0])
    assert f"| its weights | `{digest}` |" in text
    assert f"| its digest | `{digest}` |" in text  # of the reference, which is that model
    assert f"| digest of its content | `{contents(instantiate(frozen(run, *own(runs, 'x')).data))}` |" in text
    assert "| its size | 21 in train, 9 in validation |" in text
    assert ("rank 4, merged" in text) == (kind == "adapters")
    assert "A response ends in `<|im_end|>`" in text
    assert f"commit {'0' * 40}; python 3.11" in text


def test_its_metadata_is_the_hubs(runs):
    """The hub's own reader finds the figures."""
    data = ModelCard.load(runs / "weights" / "policy" / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    found = {result.metric_type: result for result in data.eval_results}
    evaluation = json.loads((runs / "weights" / "evaluation.json").read_text())
    assert {name: result.metric_value for name, result in found.items()} == {name: evaluation[name] for name in found}
    assert {"kl", "rewards/accuracies", "loss", "length", "ended"} == set(found)
    assert len(found["kl"].dataset_revision) == 16
    assert "95 %" in found["kl"].metric_name


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_this_machine_is_pushed(runs, kind):
    for file in (runs / kind / "policy").iterdir():
        content = file.read_bytes()
        assert str(runs).encode() not in content, file
        assert SECRET.encode() not in content, file
    assert "| policy before training | base |" in card(runs / kind)


def test_a_fine_tuned_policy_has_a_card_and_can_go(runs):
    """Of `dpo.sft`: recipe, data and what was measured, and nothing of a loss or reference that it has not."""
    run = runs / "tuned"
    run.mkdir()
    asked = [one for one in own(runs, "") if not one.startswith(("policy", "lr", "steps", "batch"))]
    more = [
        f"policy.base={runs / 'base'}",
        "sft.steps=3",
        "sft.batch_size=5",
        "sft.lr=0.01",
        "evaluation.temperature=0.5",
    ]
    config = frozen(run, *asked, *more, verb="sft")
    config.choices = {"data": "file", "judge": "none"}
    data = contents(instantiate(config.data))
    revisions = {"owner/pairs, split train": "f" * 40}
    config.provenance = {"commit": "0" * 40, "python": "3.11", "inputs": {"data": data}, "revisions": revisions}
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    sft.run(config, run)
    text, measured = card(run), json.loads((run / "evaluation.json").read_text())
    assert text.partition("---\n\n")[2].startswith("# sft: supervised fine-tuning\n")
    table = dict(re.findall(r"^\| ([^|]+?) \| ([^|]*?) \|$", text, re.M))
    digest = models.fingerprint(models.load(str(runs / "base"))[0])
    assert table["policy before training"] == "base"
    assert table["its weights"] == f"`{digest}`"
    assert table["digest of its content"] == f"`{data}`"
    assert table["its revision"] == f"`{'f' * 40}`"
    assert table["its size"] == "21 in train"
    assert table["optimizer"] == "adamw, 5 per step, fp32"
    assert table["learning rate"] == "0.01 at its peak, cosine"
    assert f"| length of a response, tokens | {measured['length']:.4g} |  |" in text
    assert "temperature 0.5 and cut at\n6 tokens. Intervals" in text
    assert not re.search(r"beta|reference|KL", text.partition("## Settings")[0])
    assert "/tmp" not in text
    metadata = ModelCard.load(run / "policy" / "README.md").data
    assert metadata.tags == ["sft"]
    assert metadata.datasets == ["owner/pairs"]
    assert {one.metric_value for one in metadata.eval_results} >= {measured["length"], measured["ended"]}
    assert text in push(run, "user/name", True, True)


def test_a_card_of_several_sources(runs, tmp_path):
    """It names the data sets of the hub, and no place on this machine, however deep a config has it."""
    config = OmegaConf.to_container(OmegaConf.load(runs / "weights" / "config.yaml"))
    sources = [{"path": str(tmp_path / "mine.jsonl"), "weight": 2}, {"path": "owner/name@main"}]
    config["data"] = {"_target_": "dpo.data.mixture.mixture", "sources": sources, "validation_fraction": 0.1}
    config["choices"]["data"] = "mixture"
    read = {"owner/name@main, train split": "1" * 40, "owner/name@main, test split": "1" * 40, "an/other": "2" * 40}
    config["provenance"]["revisions"] = read
    facts = cards.Facts("a", "b", {"train": 3, "validation": 2}, False, ("</s>",))
    cards.write(tmp_path, config, {"kl": 1.0, "kl/se": 0.1}, facts)
    text = (tmp_path / "README.md").read_text()
    assert ModelCard.load(tmp_path / "README.md").data.datasets == ["an/other", "owner/name"]
    assert "| data | mixture, an/other, owner/name |" in text
    assert "mine.jsonl" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_generates_the_same_text(runs, kind):
    """Greedily, by the pipeline, as by hand from our weights: the adapters' are merged."""
    folder = str(runs / kind / "policy")
    generate = transformers.pipeline("text-generation", model=folder)
    asked = "\n\nHuman: What is 3 and 3?\n\nAssistant:"
    [answer] = generate(asked, max_new_tokens=8, do_sample=False, return_full_text=False)
    if kind == "adapters":  # from the base and what the run has left beside, not from what it merged
        model, tokenizer = models.load(models.ModelSpec(str(runs / "base"), adapter=str(runs / kind / "adapter")))
    else:
        model, tokenizer = models.load(folder)
    ids = tokenizer(asked)["input_ids"]
    start = len(ids)
    while len(ids) < start + 8 and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer["generated_text"] == tokenizer.decode(ids[start:], skip_special_tokens=True)
    base, _ = models.load(str(runs / "base"))
    assert models.fingerprint(base) != models.fingerprint(model)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for; it keeps what it is sent."""

    repositories: dict = {}  # noqa: RUF012
    sent: dict = {}  # noqa: RUF012
    tokens: set = set()  # noqa: RUF012

    def log_message(self, *_):
        pass

    def _answer(self, content, code=200, **headers):
        body = json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if not self.path.startswith("/api/models/"):  # the library asks what else there is
            return self._answer({}, 404)
        self.tokens.add(self.headers.get("Authorization"))
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        if name in self.repositories:
            return self._answer({"id": name, "private": self.repositories[name], "siblings": [], "tags": []})
        return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            asked = json.loads(body)
            private = asked.get("private", asked.get("visibility") == "private")
            self.repositories[f"{asked['organization']}/{asked['name']}"] = private
            return self._answer({"url": "https://huggingface.co/me/x"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        self.tokens.add(self.headers.get("Authorization"))
        if "/preupload/" in self.path:
            files = [one["path"] for one in json.loads(body)["files"]]
            return self._answer(
                {"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in files]}
            )
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.sent[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer(
                {"commitUrl": "https://huggingface.co/me/x/commit/1", "commitOid": "1", "success": True}
            )
        return self._answer({"error": self.path}, 500)


@pytest.fixture
def hub(monkeypatch):
    Hub.repositories, Hub.sent, Hub.tokens = {}, {}, set()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield Hub
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("private", [True, False])
def test_a_policy_goes_to_the_hub(runs, hub, private):
    policy = runs / "weights" / "policy"
    said = push(runs / "weights", "me/x", private, dry_run=False)
    assert said.endswith("/me/x")
    assert hub.repositories == {"me/x": private}
    assert hub.tokens == {f"Bearer {SECRET}"}
    assert hub.sent == {file.name: file.read_bytes() for file in policy.iterdir()}
    assert {"README.md", "model.safetensors", "tokenizer.json", "config.json"} <= set(hub.sent)


def test_a_dry_run_sends_nothing(runs, hub):
    said = push(runs / "weights", "me/x", private=True, dry_run=True)
    assert (hub.repositories, hub.sent, hub.tokens) == ({}, {}, set())
    assert "private repository me/x" in said
    assert card(runs / "weights") in said
    assert f"model.safetensors  {(runs / 'weights/policy/model.safetensors').stat().st_size:,} bytes" in said


def test_a_public_repository_is_none_that_is_private(runs, hub):
    hub.repositories["me/x"] = False
    with pytest.raises(ValueError, match="me/x must be private, found a public repository; private=false sends it"):
        push(runs / "weights", "me/x", private=True, dry_run=False)
    assert not hub.sent
    push(runs / "weights", "me/x", private=False, dry_run=False)
    assert hub.sent
    assert hub.repositories == {"me/x": False}


def test_what_cannot_go(runs, hub, tmp_path, monkeypatch):
    def refused(run, match, repo="me/x"):
        with pytest.raises(ValueError, match=match):
            push(run, repo, private=True, dry_run=False)
        assert not hub.tokens

    copy = shutil.copytree(runs / "weights", tmp_path / "run")
    refused(copy, "repo must be user/name, got x", repo="x")
    refused(tmp_path, "run must be the directory of a run")
    (copy / "policy" / "README.md").unlink()
    refused(copy, "the policy must have a model card, found no .*README.md")
    (copy / "evaluation.json").rename(copy / "kept")
    refused(copy, "run must be finished, found .* stopped")
    (copy / "kept").rename(copy / "evaluation.json")
    shutil.rmtree(copy / "policy")
    refused(copy, "run must have trained a policy")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    refused(runs / "weights", "the hub wants a token, found none; set HF_TOKEN")


def test_what_the_hub_says_is_told(runs, hub, monkeypatch):
    monkeypatch.setattr(hub, "do_GET", lambda self: self._answer({"error": "You may not."}, 403))
    with pytest.raises(OSError, match=r"the hub did not take me/x: .*403"):
        push(runs / "weights", "me/x", private=True, dry_run=False)


def test_the_command(runs):
    def called(*words, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "dpo.push", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "private repository me/x" in called(f"run='{runs / 'weights'}'", "repo=me/x", "dry_run=true")
    assert "run and repo must be given" in called("repo=me/x", code=1)
    assert "takes one run, got -m" in called("-m", "repo=me/x,me/y", "run=x", code=1)
    assert "what would go there" in called("--help")
