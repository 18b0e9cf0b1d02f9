"""A reward model as judge: its score is that of the classifier's last token, whatever else is asked."""

import pytest
import torch
from omegaconf import OmegaConf
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from dpo.judges import RewardModel, compare
from dpo.settings import identity_of
from dpo.sweep.inputs import models as digests
from dpo.training import distributed

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForSequenceClassification),
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification),
}
CHAT = [{"role": "user", "content": "Where is Rome?"}]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request, tiny_model, tmp_path_factory):
    """A classifier with one label, whose tokenizer has a chat template or none, and whose ends pad."""
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(request.param))
    config, model = FAMILIES[request.param]
    tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template:
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")  # ends in padding
    made = model(
        config(
            vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.eos_token_id, num_key_value_heads=1, **SHAPE
        )
    )
    path = tmp_path_factory.mktemp("reward") / request.param
    made.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def by_hand(folder, prompt, response):
    """The head at the last token of the base model's states."""
    from transformers import AutoModelForSequenceClassification

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    if tokenizer.chat_template:
        turns = [*CHAT[:0], {"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": response}], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt, response)["input_ids"]
    with torch.no_grad():
        states = model.model(torch.tensor([ids])).last_hidden_state
        return model.score(states[0, -1]).item(), len(ids)


def test_a_run_on_the_cpu_judges_there(folder, monkeypatch):
    """Where there is a GPU, too."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert distributed.join("cpu").type == "cpu"
    assert len(RewardModel(folder, 512, None)(["Where is Rome?"], ["In Italy."])) == 1
    monkeypatch.setattr(distributed, "_here", None)
    assert distributed.here() == torch.device("cuda", 0)


def test_the_score_is_that_of_the_last_token(folder):
    judge = RewardModel(folder, 512, None)
    judge.handshake()
    prompts = ["Where is Rome?", "Tell me about cats and dogs.", "Where is Rome?"]
    responses = ["In Italy.", "Cats sleep, dogs run, and both of them eat.", ""]
    found = judge(prompts, responses)
    for prompt, response, one in zip(prompts, responses, found, strict=True):
        assert one == {"score": pytest.approx(by_hand(folder, prompt, response)[0], abs=1e-6)}
    assert judge(prompts[1:2], responses[1:2]) == found[1:2]
    assert len({one["score"] for one in found}) == 3
    best = max(range(0, 3, 2), key=lambda row: found[row]["score"])
    assert compare(judge, prompts, responses, [(0, 2)])[1] == [{"win": float(best == 0)}]


def test_what_is_too_long_is_not_judged(folder):
    _, tokens = by_hand(folder, "Where is Rome?", "In Italy.")
    assert RewardModel(folder, tokens - 1, None)(["Where is Rome?"], ["In Italy."]) == [{}]
    assert RewardModel(folder, tokens, None)(["Where is Rome?"], ["In Italy."]) != [{}]


def test_a_chat_needs_a_template(folder):
    judge = RewardModel(folder, 512, None)
    if "qwen2" in folder:
        assert judge([CHAT], ["In Italy."]) == judge(["Where is Rome?"], ["In Italy."])
    else:
        with pytest.raises(ValueError, match="must have a chat template to judge chats, found none"):
            judge([CHAT], ["In Italy."])


def test_what_is_no_reward_model_is_refused(folder, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"judge\.path must name a reward model, a folder or hub name, got none"):
        RewardModel(None, 512, None)
    with pytest.raises(ValueError, match=r"found no folder at \./no/where"):
        RewardModel("./no/where", 512, None).handshake()
    with pytest.raises(ValueError, match=r"a folder has no revision, found \S+@v1; take "):
        RewardModel(f"{folder}@v1", 512, None)
    with pytest.raises(ValueError, match="must name a classifier with one output, a reward, found 2 outputs"):
        RewardModel(tiny_model("llama"), 512, None).handshake()
    model = LlamaForCausalLM.from_pretrained(tiny_model("llama"))
    model.config.num_labels = 1
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="found no weights of the output"):
        RewardModel(str(tmp_path), 512, None).handshake()


def test_its_weights_decide_what_is_kept(folder, tmp_path, tiny_model):
    """Those that lie at its path, for answers that are kept, for pairs and for runs."""
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    node = OmegaConf.create(
        {"_target_": "dpo.judges.RewardModel", "_partial_": True, "path": str(copy), "max_length": 9, "pool": None}
    )
    config = {
        "policy": {"path": tiny_model("llama"), "base": None},
        "judge": dict(node),
        "evaluation": {"judge": dict(node)},
    }
    before = identity_of(node), digests(config)
    assert {"judge", "evaluation.judge"} <= before[1].keys()
    assert before == (identity_of(node), digests(config))
    weights = load_file(copy / "model.safetensors")
    weights["score.weight"][0, -1] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    after = identity_of(node), digests(config)
    assert after[0] != before[0]
    assert {key for key in after[1] if after[1][key] != before[1][key]} == {"judge", "evaluation.judge"}
