"""Try what a plan would run; nothing is written.

What many configs share is tried once: their data are parsed once, and a bad file is one problem.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpo.data.batches import check_prompts
from dpo.data.chats import turn
from dpo.data.instructions import read_instructions
from dpo.data.sources import absent
from dpo.data.tokens import end_of_turn
from dpo.losses.pairs import OF_REFERENCE, asked_by, try_out
from dpo.policy.folder import check_adapter
from dpo.policy.lora import Lora, check_fits
from dpo.policy.model import (
    ModelSpec,
    ask_hub,
    check_length,
    check_lora,
    check_same_tokenizer,
    check_template,
    load_tokenizer,
    resolve_path,
    without_weights,
)
from dpo.policy.scoring import Scoring
from dpo.references import Frozen, PrecomputedFiles, scored_ahead
from dpo.sweep import inputs
from dpo.sweep.directory import before
from dpo.sweep.schema import misfits, number_of_samples
from dpo.sweep.signature import in_evaluations, instantiate
from dpo.world import sizes

logger = logging.getLogger(__name__)


class Rehearsal:
    """What was tried so far, and what came of it."""

    def __init__(self) -> None:
        self.tried: dict[str, tuple[Any, str | None]] = {}

    def of(self, config: dict[str, Any]) -> dict[str, Any]:
        """What speaks against a config, and what its run would be made from."""
        if problems := misfits(config):
            return {"problems": problems, "inputs": {}}
        policy, baseline = config["policy"], config["evaluation"].get("baseline")
        base = sizes.present(policy["base"], config["cache"])
        read = policy["path"] or base, *(policy[key] for key in ("trust_remote_code", "chat_template", "date"))
        attempts: list[tuple[Any, ...]] = [
            (_data, config["data"], config["cache"]),
            (_located, policy["path"], base),
            (_readable, read),
            (_compared, policy["path"], config.get("against"), baseline, read),
            (_candidates, config.get("candidates")),
            (_prompts, config.get("of")),
            (_adapters, policy, config["cache"]),
            (read_instructions, config["evaluation"]["instructions"]),
            (instantiate, config["judge"]),
        ]
        own = {group: config["evaluation"].get(group) for group in ("judge", "engine", "rule")}
        attempts += [(_of_evaluations, group, node) for group, node in own.items() if node is not None]
        attempts += [(instantiate, node) for node in (config.get("rule"),) if node is not None]
        attempts += _rulings(config)
        if config.get("candidates") is None:  # dpo.judge asks nothing of a policy whose responses are there
            attempts.append((_long_enough, read, config["max_length"]))
        if number_of_samples(baseline) or config.get("best_of", 1) > 1:
            attempts.append((_chosen_by, config["judge"]))
        if "loss" in config:
            attempts += [(instantiate, config["engine"])]
            attempts += [(_reference, config["reference"], read, config["max_length"]), (_loss, config["loss"])]
            attempts += [(_pooled, config["reference"], config.get("scorer"))]
        tried = [self._once(*attempt) for attempt in attempts]
        if problems := [*dict.fromkeys(problem for _, problem in tried if problem is not None)]:
            return {"problems": problems, "inputs": {}}
        facts: dict[str, Any] = tried[0][0]
        with_pairs, single, demonstrations = (facts[name] for name in ("pairs", "single", "demonstrations"))
        if config.get("candidates") is None:
            problem = self._once(_templated, facts["plain"], _chat_option(config["data"]), read)[1]
            if problem is not None:
                return {"problems": [problem], "inputs": {}}
        if not demonstrations and config["command"] == "sft":
            wrong = "dpo.sft imitates demonstrations, found data without; take others: data=sft, or data with pairs"
            return {"problems": [wrong], "inputs": {}}
        if not demonstrations and config["policy"]["path"] is None:
            wrong = "policy.path must be given where the data have no demonstrations to make a policy from, found none"
            return {"problems": [f"{wrong}; add policy.path=..."], "inputs": {}}
        if not with_pairs and config["judge"] is None and config["command"] in ("train", "score", "rounds"):
            wrong = (
                "judge must be one that makes pairs of sampled responses where the data have none, found no pairs and "
                "no judge; choose one: judge=..., --help lists them (dpo.sft learns from demonstrations alone)"
            )
            return {"problems": [wrong], "inputs": {}}
        if with_pairs and config.get("pairs", {}).get("off_policy"):
            wrong = "pairs.off_policy=true makes pairs of prompts, found data with pairs; leave it out"
            return {"problems": [wrong], "inputs": {}}
        if with_pairs and config["command"] == "rounds":
            wrong = (
                "rounds sample pairs of their own, found data with pairs; take its prompts: data=prompts data.path=..."
            )
            return {"problems": [wrong], "inputs": {}}
        if config.get("of") == "pairs" and (single or not with_pairs):
            wrong = (
                f"of=pairs shows pairs that the data bring, found {'responses with a label' if single else 'none'}; "
                "give a file of pairs, such as one of dpo.judge: data=file data.path=..."
            )
            return {"problems": [wrong], "inputs": {}}
        given = with_pairs and config["command"] in ("train", "score")  # others read the prompts alone, or sample pairs
        of_data = (single, facts["alike"]) if given else (False,)
        if "loss" in config and (problem := self._once(_together, config["loss"], config["reference"], *of_data)[1]):
            return {"problems": [problem], "inputs": {}}
        models, problem = self._once(
            inputs.models,
            {
                key: config.get(key)
                for key in ("policy", "cache", "reference", "against", "candidates", "of", "evaluation", "judge")
            },
        )
        if problem is not None:
            return {"problems": [problem], "inputs": {}}
        found: dict[str, Any] = {"problems": [], "inputs": {"data": facts["data"], **models}, "pairs": given}
        return found | ({"revisions": facts["revisions"]} if facts["revisions"] else {})

    def _once(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
        key = f"{function.__name__} {json.dumps(arguments)}"
        if key not in self.tried:
            try:
                self.tried[key] = function(*arguments), None
            except ValueError as error:
                self.tried[key] = None, str(error)
            except Exception as error:  # of a function that somebody else wrote
                self.tried[key] = None, f"{type(error).__name__}: {error}"
        return self.tried[key]


def _data(node: dict[str, Any], cache: str) -> dict[str, Any]:
    """See `inputs.known`."""
    for key, value in node.items():
        if key.endswith("path") and value is not None and (problem := absent(value)):
            raise ValueError(f"data.{key} {problem}")
    if (facts := inputs.known(node, cache)) is None:
        facts = inputs.facts_of(instantiate(node))
    for level, message in facts.get("said", ()):
        logger.log(level, message)
    return facts


def _candidates(folder: str | None) -> None:
    for name in ("train.jsonl", "validation.jsonl"):
        if folder is not None and not Path(folder, name).expanduser().is_file():
            raise ValueError(f"candidates must be a folder that dpo.generate wrote, found no {name} in {folder}")


def _prompts(of: str | None) -> None:
    if of not in (None, *inputs.OF_DATA) and not Path(of).expanduser().is_file():
        raise ValueError(f"of must be {' or '.join(inputs.OF_DATA)} or a JSONL file of prompts, found no file {of}")


def _located(*paths: str | None) -> None:
    for path in paths:
        if path is not None and not Path(resolve_path(path)).is_dir():
            ask_hub(path)


def _here(path: str | None) -> bool:
    """What the hub alone could tell of a model is left to the run."""
    return path is not None and Path(resolve_path(path)).is_dir()


def _readable(read: Sequence[Any]) -> None:
    """A folder is that of a model and its tokenizer, and a chat template that was given renders a chat. read: what
    `ModelSpec` takes.
    """
    path, _, template, _ = read
    check_template(template)
    if _here(path):
        tokenizer = load_tokenizer(ModelSpec(*read))
        if template is not None:  # with a folder's own plain text may be all that is learned from
            try:
                turn(tokenizer)
            except ValueError as error:
                raise ValueError(
                    f"policy.chat_template must render a chat, found otherwise: {error}; mend it"
                ) from None
        without_weights(ModelSpec(*read))


def _chat_option(data: dict[str, Any]) -> str | None:
    """What makes chats of plain text, if these data have such an option."""
    if "sources" in data:
        return "chat:true in data.sources"
    return "data.chat=true" if "chat" in data and data.get("prompt") != "implicit" else None


def _templated(plain: bool, option: str | None, read: Sequence[Any]) -> None:
    """Chats need a template; plain prompts go without, which may not be meant where there is an option."""
    if not _here(read[0]):
        return
    tokenizer = load_tokenizer(ModelSpec(*read))
    if not plain:
        end_of_turn(tokenizer)
    elif option and tokenizer.chat_template:
        logger.warning(
            f"prompts are plain text, which {read[0]} reads without its chat template; with {option} they become turns "
            "of a user"
        )


def _long_enough(read: Sequence[Any], max_length: int) -> None:
    if _here(read[0]):
        check_length(ModelSpec(*read), "max_length", max_length)


def _adapters(policy: dict[str, Any], cache: str) -> None:
    adapter = None if policy["adapter"] is None else check_adapter(policy["adapter"])
    where, asked = policy["path"] or sizes.present(policy["base"], cache), policy["lora"]
    if where is None or not _here(where):
        return
    spec = ModelSpec(where, policy["trust_remote_code"])
    if adapter is not None:
        check_fits(without_weights(spec), adapter)
    if asked["rank"] is not None:
        check_lora(spec, Lora(**asked, seed=0))


def _compared(policy: str | None, against: str | None, baseline: str | None, read: Sequence[Any]) -> None:
    named = baseline in ("initial", "human") or number_of_samples(baseline) is not None
    others = (path := before(against, policy or "null")), None if named else baseline
    _located(*others)
    for other in others:
        _readable((other, *read[1:]))
    if path is not None and _here(path) and _here(read[0]):
        tokenizers = [load_tokenizer(ModelSpec(one, *read[1:])) for one in (path, read[0])]
        check_same_tokenizer(path, tokenizers[0], read[0], tokenizers[1])


def _chosen_by(judge: dict[str, Any] | None) -> None:
    from dpo.judges.best import check_scores  # which few plans ask for

    check_scores(instantiate(judge))


def _of_evaluations(group: str, node: dict[str, Any] | None) -> None:
    with in_evaluations(group, node):
        instantiate(node)


def _rulings(config: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What to try of each rule with its judge, and their keys: evaluations have those of the pairs, or their own."""
    of_pairs = {key: config.get(key) for key in ("judge", "rule")}
    own = {key: node for key in of_pairs if (node := config["evaluation"].get(key)) is not None}
    names = [f"evaluation.{key}" if key in own else key for key in of_pairs]
    in_both = [(_ruled, *of_pairs.values(), *of_pairs)] if of_pairs["judge"] is not None else []
    return [*in_both, (_ruled, *{**of_pairs, **own}.values(), *names)]


def _ruled(judge: dict[str, Any] | None, rule: dict[str, Any] | None, of_judge: str, of_rule: str) -> None:
    if rule is None:
        return
    from dpo.judges import is_pairwise

    if judge is None:
        raise ValueError(f"{of_rule} goes by what a judge says of each response, found no judge; leave it out")
    if is_pairwise(instantiate(judge)):
        raise ValueError(
            f"{of_rule} must be null where the judge compares pairs, as {judge['_target_']} does, found "
            f"{rule['_target_']}; leave it out, or take a judge that judges each response: {of_judge}=questions, "
            f"{of_judge}=gold"
        )


def _reference(node: dict[str, Any], read: Sequence[Any], max_length: int) -> None:
    reference = instantiate(node)
    asked = getattr(reference, "scored", reference)  # by one that is asked at each step
    path = getattr(asked, "path", None)
    if path is None or isinstance(asked, PrecomputedFiles):
        return
    _located(path)
    if isinstance(asked, Frozen) and _here(path):
        _readable((path, read[1], None, read[3]))
        if _here(read[0]):
            asked.check(ModelSpec(*read), Scoring("", "fp32", True, 1, max_length, "error"))


def _loss(node: dict[str, Any]) -> None:
    try_out(instantiate(node))


def _pooled(reference: dict[str, Any], scorer: dict[str, Any] | None) -> None:
    if scorer is not None:
        instantiate(scorer)
        scored_ahead(instantiate(reference))


def _together(
    loss: dict[str, Any], reference: dict[str, Any], single: bool, alike: dict[str, list[int]] | None = None
) -> None:
    """A loss may ask for more than a reference gives, for pairs where the data are `single` responses, or for responses
    to other prompts where most of a split have one. alike: see `inputs.known`; None: pairs are sampled.
    """
    gives, asked = getattr(instantiate(reference), "gives", ()), asked_by(instantiate(loss))
    if single and "labels" not in asked:
        raise ValueError(
            f"{loss['_target_']} learns from pairs, found data of single responses with a label; take loss=kto, or "
            "data with chosen and rejected responses"
        )
    if alike and "labels" in asked:
        for split, (most, rows) in alike.items():
            check_prompts(most, rows, f"{split} {'responses' if single else 'pairs'}")
    for what in asked:
        if what in OF_REFERENCE and what not in gives:
            raise ValueError(
                f"{loss['_target_']} needs {OF_REFERENCE[what]} under the reference, found {reference['_target_']}, "
                f"which gives none; take reference={'live or ema' if what == 'kl' else 'initial, live or ema'}"
            )


def trials(configs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each of several resolved configs gets: {"problems": [...], "inputs": {...}}, see `dpo.sweep.inputs`;
    "pairs", whether the data bring those that it trains on; and "revisions", the commits of what was read on the hub: a
    record, since content tells what a run is made from.
    """
    rehearsal = Rehearsal()
    return [rehearsal.of(config) for config in configs]
