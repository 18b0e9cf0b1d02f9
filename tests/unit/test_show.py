"""What `dpo.show` shows: numbers that add up to the log-ratio, beside the text that they are of, and nothing else."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_runs import frozen, other_model, own

from dpo import evaluate, show
from dpo.data.records import Preference, write
from dpo.data.tokens import decode, pieces
from dpo.policy import model as models
from dpo.results.side_by_side import LOWERED, RAISED, Piece, Shown, colour, html, lines, scale
from dpo.settings import evaluation_of
from dpo.sweep.rehearse import trials

STRANGE = " Café 日本 🏊 naïve…\n\n<b>&amp;"


def by_hand(path: str, prompt_ids: list[int], response_ids: list[int]) -> np.ndarray:
    """Log-probs of a response's tokens, by transformers and NumPy in float64."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + response_ids])).logits[0].double().numpy()
    logps = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logps -= logits.max(-1, keepdims=True)
    return logps[np.arange(len(prompt_ids), len(prompt_ids + response_ids)) - 1, response_ids]


def rows_of(directory):
    return [json.loads(line) for line in (directory / "tokens.jsonl").read_text().splitlines()]


@pytest.fixture
def given(tmp_path, tiny_model):
    """Two models that read the same tokens, and pairs whose held-out responses are no ASCII."""
    llama, other = tiny_model("llama"), other_model(tmp_path, tiny_model)
    path = tmp_path / "held out.jsonl"
    write(path, [Preference(f"\n\nHuman: {n}?\n\nAssistant:", STRANGE + str(n), f" Rome {n}") for n in range(3)])
    keys = [*own(tmp_path, llama), "judge=none", "device=cpu", f"against={other}", f"data.validation_path='{path}'"]
    return SimpleNamespace(policy=llama, reference=other, keys=keys)


def shown(directory, given, *more):
    directory.mkdir()
    config = frozen(directory, *given.keys, *more, verb="show")
    show.run(config, directory)
    return config, rows_of(directory), Page((directory / "show.html").read_text())


def test_pairs_have_the_log_ratios_of_both_responses(tmp_path, given, capsys):
    """Token by token those of other code; their sum is the log-ratio that the loss sees."""
    _, rows, page = shown(tmp_path / "run", given, "of=pairs", "evaluation.prompts=2", "precision=bf16")
    assert [row["name"] for row in rows] == ["chosen", "rejected"] * 2
    tokenizer = AutoTokenizer.from_pretrained(given.policy)
    for number, row in enumerate(rows):
        text = [f"{STRANGE}{number // 2}", f" Rome {number // 2}"][number % 2]
        assert row["text"] == text
        prompt = f"\n\nHuman: {number // 2}?\n\nAssistant:"
        assert row["prompt"].endswith(prompt)
        prompt_ids = tokenizer(prompt)["input_ids"]
        response_ids = [*tokenizer(prompt + text)["input_ids"][len(prompt_ids) :], tokenizer.eos_token_id]
        assert row["tokens"] == tokenizer.convert_ids_to_tokens(response_ids)
        expected = by_hand(given.policy, prompt_ids, response_ids) - by_hand(given.reference, prompt_ids, response_ids)
        assert row["log_ratios"] == pytest.approx(expected, abs=2e-5)
        sizes = [abs(value) for value in row["log_ratios"]]
        assert min(sizes[:3]) > 1e-3  # there is something to see
        assert page.responses[number].total == f"{expected.sum():+.2f} nats over {len(response_ids)} tokens"
        assert "".join(span.text for span in page.responses[number].spans if "special" not in span.kind) == text
    assert page.prompts == [row["prompt"] for row in rows[::2]]
    said = capsys.readouterr().out
    assert f"chosen: {page.responses[0].total}: ' Café 日本" in said
    made = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (made["responses"], made["tokens"]) == (4, sum(len(row["tokens"]) for row in rows))


def test_responses_of_both_to_test_prompts(tmp_path, given):
    """Those that an evaluation of the two would be of, policy and reference in turn."""
    config, rows, page = shown(tmp_path / "run", given, "evaluation.prompts=3", "max_new_tokens=6")
    assert [row["name"] for row in rows] == ["policy", "reference"] * 3
    settings = evaluation_of(config)
    prompts = [row["prompt"].removeprefix("<s>") for row in rows[::2]]
    assert len({*prompts}) == 3
    for first, path, stream in ((0, given.policy, "policy"), (1, given.reference, "initial policy")):
        model, tokenizer = models.load(path)
        samples = evaluate.respond(model, tokenizer, prompts, settings, stream, title="")
        assert [row["text"] for row in rows[first::2]] == [one.text for one in samples]
        for row, one in zip(rows[first::2], samples, strict=True):
            ids = (one.prompt_ids, one.response_ids)
            assert row["log_ratios"] == pytest.approx(
                by_hand(given.policy, *ids) - by_hand(given.reference, *ids), abs=2e-5
            )
    assert [one.name for one in page.responses] == ["policy", "reference"] * 3
    assert page.title == f"{given.policy} against {given.reference}"


def test_prompts_of_a_file(tmp_path, given):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Hello there", "¿Qué?")))
    _, rows, page = shown(tmp_path / "run", given, f"of={file}", "max_new_tokens=4", "evaluation.prompts=2")
    assert [row["prompt"] for row in rows[::2]] == page.prompts == ["<s>Hello there", "<s>¿Qué?"]


def test_what_cannot_be_shown(tmp_path, given, tiny_model, monkeypatch):
    directory = tmp_path / "run"
    keys = [one for one in given.keys if not one.startswith("against")]
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="must have the tokenizer of the policy"):
        show.run(frozen(directory, *keys, f"against={tiny_model('qwen2')}", verb="show"), directory)

    def tried(*more, keys=keys):
        return trials([OmegaConf.to_container(frozen(directory, *keys, *more, verb="show"))])[0]

    labelled = tmp_path / "labelled.jsonl"
    rows = ({"prompt": f"a {row}", "completion": "b", "label": row % 2} for row in range(40))
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models_alone = f"policy.path={given.policy}", f"against={given.reference}", "judge=none"
    for data, found in (["data=world"], "none"), (["data=unpaired", f"data.path={labelled}"], "responses with a label"):
        [problem] = tried("of=pairs", *data, keys=models_alone)["problems"]
        assert problem.startswith(f"of=pairs shows pairs that the data bring, found {found}; give a file of pairs")
    assert tried()["problems"][0].startswith("against=initial is what the run of dpo.train that made policy.path=")
    away = tmp_path / "away.jsonl"
    [problem] = tried(f"against={given.reference}", f"of={away}")["problems"]
    assert problem == f"of must be test or pairs or a JSONL file of prompts, found no file {away}"
    inputs = []
    for text in ("one", "two"):
        away.write_text(json.dumps({"prompt": text}) + "\n")
        inputs.append(tried(f"against={given.reference}", f"of={away}")["inputs"])
    assert inputs[0]["of"] != inputs[1]["of"]
    assert inputs[0]["against"] == inputs[1]["against"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_pieces_are_the_text(tiny_model, family):
    """Each token in one piece, in order; a character of several tokens is whole; a special token has no text."""
    tokenizer = models.load_tokenizer(tiny_model(family))
    prompt_ids = tokenizer("Human:")["input_ids"]
    ids = tokenizer(STRANGE, add_special_tokens=False)["input_ids"]
    ids = [*ids[:2], tokenizer.eos_token_id, *ids[2:], tokenizer.eos_token_id]
    found = pieces(prompt_ids, ids, tokenizer)
    assert [id for _, some in found for id in some] == ids
    assert "".join(text for text, _ in found) == decode(prompt_ids, ids, tokenizer) == STRANGE
    assert not any("\ufffd" in text for text, _ in found)
    assert [some for text, some in found if text == ""] == [[tokenizer.eos_token_id]] * 2
    assert max(len(some) for _, some in found) > 1  # 🏊
    assert sum(len(some) == 1 for _, some in found) > 5


def test_a_cut_character_is_shown_as_the_text_has_it(tiny_model):
    tokenizer = models.load_tokenizer(tiny_model("llama"))
    ids = tokenizer(" a🏊", add_special_tokens=False)["input_ids"][:-1]
    found = pieces([], ids, tokenizer)
    assert "".join(text for text, _ in found) == decode([], ids, tokenizer)
    assert [id for _, some in found for id in some] == ids


class Page(HTMLParser):
    """What a browser finds: the prompts, and of each response its name, its total and its coloured pieces."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.prompts, self.responses, self.legend, self.title = [], [], [], [], ""
        self.inside = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if tag not in ("meta", "link", "img"):
            self.inside.append((tag, given.get("class", "")))
        if tag == "div" and given.get("class") == "prompt":
            self.prompts.append("")
        if tag == "b":
            self.responses.append(SimpleNamespace(name="", total="", spans=[]))
        if tag == "span":
            self.spans.append(SimpleNamespace(text="", kind=given.get("class", ""), **{"style": given["style"]}))
            self.spans[-1].told = given.get("title")

    @property
    def spans(self):
        return self.legend if not self.responses else self.responses[-1].spans

    def handle_endtag(self, tag):
        assert self.inside.pop()[0] == tag

    def handle_data(self, text):
        tag, kind = self.inside[-1] if self.inside else ("", "")
        if tag == "title":
            self.title += text
        elif kind == "prompt":
            self.prompts[-1] += text
        elif tag == "b":
            self.responses[-1].name += text
        elif tag == "span":
            self.spans[-1].text += text
        elif tag == "div" and self.responses and not self.responses[-1].spans:
            self.responses[-1].total += text.strip().removeprefix(":").strip()


EVIL = "<script>alert('x')</script>\"><img src=x onerror=y>&lt;\x1b[2J\n"
MADE = [
    Shown(
        EVIL, EVIL, [Piece(EVIL, [(EVIL, 2.0)]), Piece("é", [("Ã", -0.5), ("©", -0.25)]), Piece("", [("</s>", 0.0)])]
    ),
    Shown(EVIL, "other", [Piece("a", [("a", -4.0)])]),
    Shown("second", "policy", [Piece(" b", [("Ġb", 1.0)])]),
]


def test_the_page_holds_the_text_and_nothing_of_it_acts():
    text = html(EVIL, MADE)
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "a", "object"}
    assert not [name for _, given in page.tags for name in given if name.startswith("on") or name in ("src", "href")]
    [policy] = [given["content"] for tag, given in page.tags if tag == "meta" and "content" in given]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert page.title == EVIL
    assert page.prompts == [EVIL, "second"]
    assert [one.name for one in page.responses] == [EVIL, "other", "policy"]
    assert [one.total for one in page.responses] == [
        *("+1.25 nats over 4 tokens", "-4.00 nats over 1 token", "+1.00 nats over 1 token")
    ]
    first = page.responses[0].spans
    assert [(span.text, span.kind) for span in first] == [(EVIL, ""), ("é", ""), ("</s>", "special")]
    assert [span.told for span in first] == [
        *(f"{EVIL} +2.000 nats", "-0.750 nats = Ã -0.500; © -0.250", "</s> +0.000 nats")
    ]
    assert [span.style for span in first] == [f"background:{colour(value, 4.0)}" for value in (2.0, -0.75, 0.0)]


def test_the_scale_has_numbers_in_its_colours():
    page = Page(html("", MADE))
    assert [span.text for span in page.legend] == [
        *("-4.00", "-3.00", "-2.00", "-1.00", "+0.00", "+1.00", "+2.00", "+3.00", "+4.00")
    ]
    assert [span.style for span in page.legend] == [
        f"background:{colour(float(span.text), 4.0)}" for span in page.legend
    ]


def test_the_scale_holds_most_tokens_and_does_not_colour_rounding():
    def of(*values):
        return scale([Shown("", "", [Piece("a", [("a", value)]) for value in values])])

    assert of(*range(1, 21)) == 19  # 95 %
    assert of(-3.0, 1.0) == 3.0
    assert of(1e-6, -2e-6) == 0.1
    assert scale([]) == 0.1


def hexed(rgb):
    return "#" + "".join(f"{part:02x}" for part in rgb)


def test_colours():
    """White at 0, evenly to the ends, and the ends beyond; black text is read on all."""
    assert [colour(value, 2.0) for value in (0.0, 2.0, 50.0, -2.0, -2.1)] == [
        *("#ffffff", hexed(RAISED), hexed(RAISED), hexed(LOWERED), hexed(LOWERED))
    ]
    assert colour(1.0, 2.0) == hexed([round((255 + part) / 2) for part in RAISED])
    for end in (RAISED, LOWERED):
        assert (linear(end) @ [0.2126, 0.7152, 0.0722] + 0.05) / 0.05 > 7  # contrast, WCAG 2


def linear(rgb):
    share = np.array(rgb) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


MACHADO = {  # linear RGB as seen without a kind of cone (Machado et al. 2009, severity 1)
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("kind", MACHADO)
def test_colour_blind_people_tell_the_ends_apart(kind):
    seen = [np.clip(np.array(MACHADO[kind]) @ linear(end), 0, 1) for end in (RAISED, LOWERED, (255, 255, 255))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(seen[one] - seen[other]).max() > 0.25


def test_lines_are_short_and_no_terminal_obeys_them():
    long = [Piece(f" w{n}", [(f"w{n}", (-1) ** n * n / 10)]) for n in range(100)]
    said = lines([*(replace(one, name="policy") for one in MADE), Shown("p" * 500, "policy", long)])
    assert all(line.isprintable() and len(line) < 300 for line in said)
    assert "alert" in said[0]
    assert said[-3].startswith("  policy: -5.00 nats over 100 tokens: ' w0 w1")
    assert said[-2:] == [
        "    most raised: ' w98' +9.80, ' w96' +9.60, ' w94' +9.40",
        "    most lowered: ' w99' -9.90, ' w97' -9.70, ' w95' -9.50",
    ]
    few = [Piece("é日", [("x", 1.0)]), Piece("a", [("a", -0.004)])]  # which would be written -0.00
    assert lines([Shown("p", "policy", few)])[1:] == [
        *("  policy: +1.00 nats over 2 tokens: 'é日a'", "    most raised: 'é日' +1.00")
    ]
