"""Which policy of a run to keep: the one of the last step, or the one of the lowest validation loss."""

import json
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.policy import model as models
from dpo.training import distributed


class BestCheckpoint:
    """The best policy so far, whole on disk: `selected/step-<n>/`, named by `selected/step.json` with its metrics.

    Losses of different beta or reference do not compare, so policies are only ever chosen within a run.
    """

    def __init__(self, directory: Path) -> None:
        self.folder = directory / "selected"
        self.record = self.folder / "step.json"
        saved = json.loads(self.record.read_text()) if self.record.exists() else {}
        self.step: int | None = saved.get("step")
        self.metrics: dict[str, float] = saved.get("metrics", {})

    def update(
        self, step: int, metrics: dict[str, float], policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Keep the policy after `step` if its validation loss is the lowest so far. A collective.

        A run that resumes before its selected step comes by there again: then the policy of this training replaces it.
        """
        lowest = not self.metrics or metrics["loss"] < self.metrics["loss"]
        if not lowest and step != self.step:
            return
        self.step, self.metrics = step, metrics
        self.folder.mkdir(exist_ok=True)
        models.save(policy, tokenizer, self.folder / f"step-{step}")
        if distributed.is_main():
            unfinished = self.record.with_suffix(".unfinished")
            unfinished.write_text(json.dumps({"step": step, "metrics": metrics}, indent=1) + "\n")
            unfinished.replace(self.record)  # the new one counts from here on; a stop before this leaves the old one
            for former in self.folder.glob("step-*"):
                if former.name != f"step-{step}":
                    shutil.rmtree(former, ignore_errors=True)

    def finalize(self, target: Path) -> None:
        """Move the selected policy to `target`; again, after a stop, nothing is left to do. A collective."""
        selected = self.folder / f"step-{self.step}"
        if distributed.is_main() and selected.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            selected.rename(target)
        if distributed.is_main():
            models.move_adapter_out(target)
        distributed.any_true(False)  # a barrier: now it is there for all
