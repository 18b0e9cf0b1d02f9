"""A config node that names a function in `_target_`: which it may name, and its annotated signature as the schema.

A config may come from elsewhere, and importing or calling what it names executes code. So a node names a function or
class of ours that belongs to its group, or one of a package that the user's own environment names:

    DPO_PLUGINS=my_package python -m dpo.train loss=mine
"""

import inspect
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache, partial
from importlib import import_module
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from typing_extensions import is_typeddict

PLUGINS = "DPO_PLUGINS"  # environment variable: packages of the user's own, parted by commas
WORDS = ("_target_", "_partial_", "_convert_")  # of a node, that are no options

# Keys of other programs -> what says the same here
OTHERWISE = {
    "dtype": "weights are float32, and precision=bf16 is that of products",
    "torch_dtype": "weights are float32, and precision=bf16 is that of products",
    "attn_implementation": "attention is that of the shared prefix, see docs/models.md",
    "revision": "it stands after a name on the hub: {}.path=name@revision",
    "prompts": "prompts of yours are data=prompts data.path=FILE, or with python -m dpo.show of=FILE",
    "gradient_accumulation_steps": "batch_size is that of a step, and micro_batch_tokens what is in memory at once",
}
OF_TRL = {  # keys of TRL's DPOConfig and ModelConfig -> keys that say the same here
    "model_name_or_path": "policy.path",
    "ref_model": "reference",
    "sync_ref_model": "reference",
    "reference_free": "reference",
    "loss_type": "loss",
    "dataset_name": "data",
    "per_device_train_batch_size": "batch_size",
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup_steps",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "bf16": "precision",
    "gradient_checkpointing": "activation_checkpointing",
    "truncation_mode": "on_too_long",
    "eval_steps": "evaluate_every",
    "save_steps": "checkpoint_every",
    "save_total_limit": "checkpoints_kept",
    "output_dir": "runs",
    "run_name": "name",
    "report_to": "wandb.mode",
    "lora_r": "policy.lora.rank",
    "lora_alpha": "policy.lora.alpha",
    "lora_target_modules": "policy.lora.targets",
    "load_in_4bit": "policy.lora.quantize",
}

# Group -> where our functions for it live, and its forms: the arguments that a function is given when it is called, not
# from the config, and what it returns or, as a class, can do.
GROUPS: dict[str, tuple[tuple[str, ...], dict[tuple[str, ...], str | tuple[str, ...]]]] = {
    "data": (("dpo.data", "dpo.world"), {(): "dpo.data.records.Dataset"}),
    "engine": (
        ("dpo.engines",),
        {("model", "tokenizer", "prompts", "places", "sampling", "seed", "title"): "list[dpo.policy.sampling.Sample]"},
    ),
    "judge": (
        ("dpo.judges",),
        {
            ("prompts", "responses"): "list[dict[str, float]]",
            ("prompts", "firsts", "seconds"): "list[typing.Literal['win', 'tie', 'lose']]",
        },
    ),
    "rule": (("dpo.judges",), {("first", "second"): "float"}),
    "loss": (("dpo.losses",), {("pair",): "dpo.losses.pairs.Loss"}),
    "reference": (("dpo.references",), {(): ("check", "prepare")}),
    "scorer": (("dpo.policy.pool", "dpo.vllm_scorer"), {(): ("check", "passes")}),
    "hydra.launcher": (("hydra_plugins.dpo_launchers",), {(): ("problems", "start")}),
}


def instantiate(node: Any) -> Any:
    """What the node's function returns, or the function itself with the node's options (`_partial_`); null is None.

    Raises: ValueError if the function is none that a config may name for any group, and what the function raises.
    """
    if node is None:
        return None
    values: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    function = _located(values["_target_"], [home for homes, _ in GROUPS.values() for home in homes])
    if all(_unfit(function, returns) for _, forms in GROUPS.values() for returns in forms.values()):
        raise ValueError(f"_target_ must name a function of a group ({', '.join(GROUPS)}), got {values['_target_']}")
    options = {key: _instantiated(value) for key, value in values.items() if key not in WORDS}
    if not values.get("_partial_"):
        return function(**options)
    if isinstance(function, type):  # a module: what its constructor does not take is for its `forward`
        own = inspect.signature(function).parameters.keys() & options
        function = function(**{key: options.pop(key) for key in own})
    return partial(function, **options)


@contextmanager
def in_evaluations(group: str, node: Any) -> Iterator[None]:
    """Inside, what is wrong with an option of evaluations' own part is said by its key there: evaluation.judge.path.

    node: of that part; None: evaluations have that of the pairs.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        said = re.sub(rf"(?<![\w.]){group}(?=[.=])", f"evaluation.{group}", str(error))
        if node is None or said == str(error):
            raise
        error.args = (said,)
        raise


def _instantiated(option: Any) -> Any:
    if isinstance(option, dict):
        return instantiate(option) if "_target_" in option else {key: _instantiated(one) for key, one in option.items()}
    return [_instantiated(one) for one in option] if isinstance(option, list) else option


def check_signature(group: str, node: Any, at: str | None = None, also: tuple[str, ...] = ()) -> list[str]:
    """What keeps a node from naming a function of its group, and its options from being that function's arguments.

    An option that is a function is a node of the same group, which is given `beta`, too.

    at: where the node is, if not at `group`. also: what the function receives later beside what one of its group does.
    """
    at = at or group
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        return [f"{at} must name its function in _target_, found {node!r}; choose an option: {group}=..."]
    homes, forms = GROUPS[group]
    try:
        target = _located(node["_target_"], homes)
        unfit = {given: _unfit(target, returns) for given, returns in forms.items()}
        given = (*next((given for given, why in unfit.items() if why is None), ()), *also)
        parameters = dict(inspect.signature(target, eval_str=True).parameters)
        if given and (forward := getattr(target, "forward", None)):  # of a module
            parameters |= inspect.signature(partial(forward, None), eval_str=True).parameters
    except Exception as error:  # whatever importing that module raises
        return [f"{at}._target_ must name a function, got {node['_target_']}: {error}"]
    if why := ", or ".join(map(str, unfit.values() if None not in unfit.values() else ())):
        return [f"{at}._target_ must name a function for {group}, got {node['_target_']}, which {why}"]
    if missing := [name for name in given if name not in parameters]:
        return [f"{at}._target_ must name a function of {', '.join(given)}; {node['_target_']} has no {missing[0]}"]
    if node.get("_partial_", False) is not bool(given):
        return [f"{at}._partial_ must be {str(bool(given)).lower()}, got {node.get('_partial_')!r}"]
    options = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    expected = [name for name in parameters if name not in given]
    problems = [
        f"{at}.{name} is not an option of {node['_target_']}, which has {', '.join(expected) or 'none'}"
        for name in options
        if name not in expected
    ]
    for name in expected:
        parameter = parameters[name]
        if name not in options:
            if parameter.default is parameter.empty:
                problems.append(f"{at}.{name} must be given for {node['_target_']}; add {at}.{name}=...")
        elif get_origin(parameter.annotation) is Callable:
            problems += check_signature(group, options[name], f"{at}.{name}", ("beta",))
        else:
            problems += _misfits(f"{at}.{name}", options[name], parameter.annotation)
    return problems


def _misfits(at: str, value: Any, annotation: Any) -> list[str]:
    """What keeps a value from being of a type; of a dictionary with typed keys, which of these."""
    keyed = [one for one in (annotation, *get_args(annotation)) if is_typeddict(one)]
    if keyed and isinstance(value, dict):
        types = get_type_hints(keyed[0])
        if value.keys() == types.keys():
            return [problem for key, one in types.items() for problem in _misfits(f"{at}.{key}", value[key], one)]
        return [f"{at} must have the keys {', '.join(types)}, got {', '.join(map(str, value))}"]
    return [] if fits(value, annotation) else [f"{at} must be {kind(annotation)}, got {value!r}"]


def _located(path: str, homes: Sequence[str]) -> Callable[..., Any]:
    """The function or class of that name, made in one of `homes` or in a package of the user's; no other is imported.

    Raises: ValueError; and what importing its module raises.
    """
    homes = [*homes, *(name.strip() for name in os.environ.get(PLUGINS, "").split(",") if name.strip())]

    def inside(module: str) -> bool:
        return any(module == home or module.startswith(f"{home}.") for home in homes)

    module, _, name = path.rpartition(".")
    if not inside(module):
        raise ValueError(
            f"it must lie in {' or '.join(homes)}; a package of your own is named by the environment: {PLUGINS}=package"
        )
    found = getattr(import_module(module), name, None)
    if name.startswith("_") or not callable(found) or not inside(getattr(found, "__module__", None) or ""):
        raise ValueError(f"{module} defines no such function")
    return found


def _unfit(target: Any, expected: str | tuple[str, ...]) -> str | None:
    """Why a function does not return what one of its group does, by its annotation; or a class is not that itself."""
    returned = inspect.signature(getattr(target, "forward", target), eval_str=True).return_annotation
    if isinstance(expected, str):
        found = inspect.formatannotation(returned) if returned is not inspect.Signature.empty else "nothing named"
        return None if found == expected else f"must return {expected} by its annotation, found {found}"
    missing = [name for name in expected if not hasattr(target if isinstance(target, type) else returned, name)]
    return f"must have, or return what has, {', '.join(missing)}" if missing else None


def no_key(key: str, known: Collection[str], keys: Collection[str] = ()) -> str:
    """What to say of a key that is none. known: those that there are in its place, without what is before them.
    keys: all that there are, with it: one with the same last word may be meant.
    """
    before, dot, last = key.rpartition(".")
    if where := OTHERWISE.get(last):
        return f"{key} is not a key of this command; {where.format(before or 'policy')}"
    ours = OF_TRL.get(last)
    if ours and (same := [one for one in (f"{before}{dot}{ours}", ours, f"sft.{ours}") if one in (*known, *keys)]):
        return f"{key} is not a key of this command; here it is {same[0]}"
    near = [last.replace("/", ".")] if "/" in last else get_close_matches(last.lower(), known, 1, 0.65)
    meant = [f"{before}{dot}{near[0]}"] if near else [one for one in keys if one.endswith(f".{last}") and one != key]
    if dot and known and not meant:
        return f"{key} is not a key of this command; {before} has {', '.join(one for one in known if one[0] != '_')}"
    hint = f"did you mean {' or '.join(meant)}?" if meant else "--help lists the keys"
    return f"{key} is not a key of this command; {hint}"


def no_option(group: str, option: str, known: Collection[str], how: str) -> str:
    """What to say of an option that a group does not have. how: what to do where there is none like it."""
    near = get_close_matches(option.lower(), known, 1)
    what = f"did you mean {near[0]}?" if near else how
    return f"{group} must be one of {', '.join(known)}, got {option or 'nothing'}; {what}"


def kind(annotation: Any) -> str:
    """A type as a reader writes it."""
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    return inspect.formatannotation(annotation)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value of a config is of a type as it stands; a whole number is a float, too."""
    from pydantic import PydanticUserError, ValidationError  # takes a tenth of a second that --help does without

    try:
        _holder(annotation)(value=value)
    except ValidationError:
        return False
    except PydanticUserError:  # no type that can be checked
        pass
    return True


@cache
def _holder(annotation: Any) -> Any:
    from pydantic import create_model

    annotation = Any if annotation is inspect.Parameter.empty else annotation
    return create_model("Holder", value=annotation, __config__={"strict": True, "arbitrary_types_allowed": True})
