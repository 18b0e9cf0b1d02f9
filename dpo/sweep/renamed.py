"""Former names of keys and options. They work until the next release, which deletes this file."""

from collections.abc import Sequence

KEYS = {
    "betas": "adam_betas",
    "evaluation.samples": "evaluation.log_samples",
    "generation.samples": "generation.samples_per_prompt",
    "policy.sequences": "policy.generation_batch_size",
    "recompute": "activation_checkpointing",
    "select": "keep",
}
OPTIONS = {
    "keep": {"validation_loss": "best"},
    "reference": {"given": "precomputed", "moving": "ema", "prior": "unconditional", "uniform": "reference_free"},
}


def renamed(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line in the names of now, and a line for each former name that was in it."""
    found, said = [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        bare = key.lstrip("+~")
        known = KEYS.get(bare, bare)
        options = OPTIONS.get(known, {})
        values = [options.get(option, option) for option in value.split(",")]
        now = f"{key.removesuffix(bare)}{known}{equals}{','.join(values)}"
        if now != argument:
            said.append(f"{argument} is {now} now; the former name works until the next release")
        found.append(now)
    return found, said
