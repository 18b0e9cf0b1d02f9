"""Former names of the command line."""

import pytest
from hydra import compose, initialize_config_dir

from dpo import HOME
from dpo.sweep.renamed import KEYS, OPTIONS, renamed


@pytest.mark.parametrize(
    "former,now",
    [
        ("reference=initial,uniform,prior", "reference=initial,reference_free,unconditional"),
        ("reference=moving", "reference=ema"),
        ("reference=given", "reference=precomputed"),
        ("+select=validation_loss", "+keep=best"),
        ("betas=[0.9,0.95]", "adam_betas=[0.9,0.95]"),
        ("recompute=true", "activation_checkpointing=true"),
        ("policy.sequences=8,16", "policy.generation_batch_size=8,16"),
        ("generation.samples=2", "generation.samples_per_prompt=2"),
        ("evaluation.samples=0", "evaluation.log_samples=0"),
    ],
)
def test_a_former_name_is_the_new_one_and_is_told(former, now):
    line, said = renamed(["-m", former, "name=uniform"])
    assert line == ["-m", now, "name=uniform"]
    assert said == [f"{former} is {now} now; the former name works until the next release"]


def test_names_of_now_are_left_alone():
    line = ["-m", "reference=other", "reference.path=prior,moving", "beta=0.1,0.2", "--cfg", "job", "name=given"]
    assert renamed(line) == (line, [])


def test_they_become_names_that_there_are():
    with initialize_config_dir(str(HOME / "conf"), version_base="1.3"):
        config = compose("train")
    for key in KEYS.values():
        node = config
        for part in key.split("."):
            node = node[part]
    options = {file.stem for file in (HOME / "conf" / "reference").glob("*.yaml")}
    assert options >= set(OPTIONS["reference"].values())
    assert not options & set(OPTIONS["reference"])
