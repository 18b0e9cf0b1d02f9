"""What the commands read of a config, as the values that the code below them takes."""

from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any

from omegaconf import OmegaConf

from dpo.data.treatment import Treatment
from dpo.data.truncation import Limits
from dpo.judges import Rule, cached_judge
from dpo.judges.best import check_scores
from dpo.losses.pairs import unbound
from dpo.policy.lora import Lora
from dpo.policy.model import ModelSpec
from dpo.policy.sampling import Sampling
from dpo.policy.scoring import Scoring
from dpo.sweep.inputs import folder_of, sketch
from dpo.sweep.schema import number_of_samples
from dpo.sweep.signature import in_evaluations, instantiate
from dpo.training.distributed import ParallelLayout, is_main
from dpo.training.optim import Recipe
from dpo.world import sizes


@dataclass(frozen=True)
class Evaluation:
    """How a policy is measured."""

    prompts: int  # test prompts, one response to each
    log_samples: int  # responses to look at while training
    rule: Rule | None  # which of two judged responses is preferred; None: that of the higher score
    engine: Any  # the node of the config; None: responses come from transformers
    own_engine: Any  # the same, if it is not that of the candidates
    sampling: Sampling  # of the win-rate samples
    seed: int
    limits: Limits
    packed: bool  # see `Scoring`; of the passes that measure KL
    micro_batch_tokens: int
    cache: str  # folder of the baseline's responses


@dataclass(frozen=True)
class BestOf:
    """Of several samples to a prompt the best, by the judge and the rule that pairs are made with."""

    n: int
    judge: Any
    rule: Rule | None
    decides: dict[str, Any]  # what of the two decides which is best


@dataclass(frozen=True)
class Generation:
    """How candidate responses are made."""

    engine: Any  # the node of the config
    decides: dict[str, Any]  # what of it decides the responses
    samples_per_prompt: int
    sampling: Sampling
    seed: int
    limits: Limits
    cache: str  # folder of the candidates


@dataclass(frozen=True)
class Pairing:
    """How candidates become pairs."""

    pairs_per_prompt: int  # at most
    seed: int
    judge: dict[str, Any]  # what decides its answers
    rule: dict[str, Any] | None  # as the config names it
    cache: str  # folder of the pairs


@dataclass(frozen=True)
class Sft:
    """How a base model becomes the policy that preference training starts from."""

    base: ModelSpec
    recipe: Recipe
    # keys of the config, by their names there
    seed: int
    max_length: int
    on_too_long: str
    precision: str
    packed: bool
    micro_batch_tokens: int
    activation_checkpointing: bool
    evaluate_every: int
    checkpoint_every: int
    checkpoints_kept: int
    cache: str


def policy_spec(config: Any, path: str | None = None) -> ModelSpec:
    """The policy that a run starts from, or the model that it is made from; with a path, that one, read likewise."""
    policy = config.policy
    where = path or policy.path or policy.base
    where = sizes.place(where, config.cache)
    adapter = None if path else policy.get("adapter")
    return ModelSpec(where, policy.trust_remote_code, policy.chat_template, policy.date, layout(config), adapter)


def lora_of(config: Any) -> Lora | None:
    """The adapters that `dpo.train` or `dpo.sft` trains, and `dpo.data` counts; None: all weights, or nothing."""
    asked = config.policy.get("lora")  # runs from before have none
    if asked is None or asked.rank is None or config.command not in ("data", "sft", "train"):
        return None
    targets = asked.targets if isinstance(asked.targets, str) else tuple(asked.targets)
    return Lora(asked.rank, asked.alpha, targets, config.seed, quantize_of(config))


def quantize_of(config: Any) -> str | None:
    """How the policy that training starts from is quantized, to whatever command it is one."""
    asked = config.policy.get("lora")
    return None if asked is None or asked.rank is None else asked.get("quantize")


def layout(config: Any) -> ParallelLayout:
    """How a model lies on the processes of a run: what it says in `sharding`, and its precision."""
    return ParallelLayout(**config.sharding, precision=config.precision)


def treatment_of(config: Any) -> Treatment:
    """What is done to the training pairs."""
    return Treatment(**{key: value for key, value in config.pairs.items() if key != "off_policy"})


def judge_of(config: Any) -> Any:
    """The judge of a run, or None; the answers of a costly one are kept in the cache."""
    return _judge(config.judge, config.cache)


def evaluation_judge(config: Any) -> Any:
    """The judge of evaluations: that of the pairs, unless another is given."""
    own = config.evaluation.judge
    with in_evaluations("judge", own):
        judge = _judge(config.judge if own is None else own, config.cache)
    if own is None:
        return judge

    @wraps(judge)
    def named(*columns: Any) -> Any:
        with in_evaluations("judge", own):
            return judge(*columns)

    return named


def judges_of(config: Any) -> tuple[Any, Any]:
    """The judge of the pairs, and that of evaluations: one, loaded and asked its first question once, or another."""
    of_pairs = judge_of(config)
    return of_pairs, of_pairs if config.evaluation.judge is None else evaluation_judge(config)


def _judge(node: Any, cache: str) -> Any:
    """The judge that a node names, if it is there: one behind a server is asked a question first, on rank 0."""
    if node is None:
        return None
    judge = instantiate(node)
    if (handshake := getattr(unbound(judge), "handshake", None)) and is_main():
        handshake()
    return cached_judge(judge, identity_of(node), cache)


def identity_of(node: Any) -> dict[str, Any]:
    """What decides the answers of a judge or engine: its options without those that say where it is and how it is
    asked; of a model in a folder what is in that.
    """
    options: Any = OmegaConf.to_container(node, resolve=True)
    options = {key: value for key, value in options.items() if key not in ("server", "cache", "llm", "pool")}
    return options | ({"weights": sketch(folder)} if (folder := folder_of(options)) is not None else {})


def limits_of(config: Any) -> Limits:
    return Limits(config.max_length, config.max_new_tokens, config.on_too_long)


def evaluation_of(config: Any) -> Evaluation:
    asked = config.evaluation
    sampling = Sampling(config.max_new_tokens, asked.temperature, 1.0, asked.batch_size)
    read = config.packed, config.micro_batch_tokens
    rule = instantiate(config.get("rule") if asked.get("rule") is None else asked.rule)
    which = asked.prompts, asked.log_samples, rule
    engine = asked.get("engine")
    if engine is None and config.get("command") in ("evaluate", "show"):  # which sample nothing else
        engine = None if config.engine._target_ == "dpo.engines.transformers" else config.engine
    with in_evaluations("engine", own := asked.get("engine")):
        check_engine(engine)
    return Evaluation(*which, engine, own, sampling, config.seed, limits_of(config), *read, config.cache)


def check_engine(node: Any, how: str = "check") -> None:
    """Refuse an engine that can tell, before a model is loaded, that it could not start. how: "handshake", before one
    is trained, that its server does not answer. Raises: ValueError; RuntimeError.
    """
    if (check := getattr(unbound(instantiate(node)), how, None)) and is_main():
        check()


def policy_best_of(config: Any) -> BestOf | None:
    """Whether it is best of n that `dpo.evaluate` measures. Raises: ValueError if the judge of pairs does not score."""
    return _best_of(config, config.best_of)


def baseline_best_of(config: Any) -> BestOf | None:
    """The same of what is compared with."""
    return _best_of(config, number_of_samples(config.evaluation.baseline) or 1)


def _best_of(config: Any, n: int) -> BestOf | None:
    if n == 1:
        return None
    check_scores(judge := judge_of(config))
    pairing = pairing_of(config)
    return BestOf(n, judge, instantiate(config.get("rule")), {"judge": pairing.judge, "rule": pairing.rule})


def generation_of(config: Any) -> Generation:
    asked = config.generation
    sampling = Sampling(config.max_new_tokens, asked.temperature, asked.top_p, asked.batch_size)
    return Generation(
        config.engine,
        identity_of(config.engine),
        asked.samples_per_prompt,
        sampling,
        config.seed,
        limits_of(config),
        config.cache,
    )


def pairing_of(config: Any) -> Pairing:
    rule: Any = OmegaConf.to_container(node) if (node := config.get("rule")) is not None else None
    return Pairing(config.generation.pairs_per_prompt, config.seed, identity_of(config.judge), rule, config.cache)


def scoring_of(config: Any) -> Scoring:
    names = ("cache", "precision", "packed", "micro_batch_tokens", "max_length", "on_too_long")
    return Scoring(**{name: config[name] for name in names}, per_token=config.get("per_token", False))


def scoring_beside(config: Any) -> Scoring:
    """The same, in the pool that the config names, if it names one."""
    pool = instantiate(config.scorer)
    return replace(scoring_of(config), pool=pool, seed=config.seed, batch_size=config.batch_size)


def sft_of(config: Any) -> Sft:
    both = {"optimizer": config.optimizer, "weight_decay": config.weight_decay, "max_grad_norm": config.max_grad_norm}
    recipe = Recipe(**config.sft, **both, adam_betas=list(config.adam_betas))
    names = [one.name for one in fields(Sft) if one.name not in ("base", "recipe")]
    return Sft(policy_spec(config, config.policy.base), recipe, **{name: config[name] for name in names})
