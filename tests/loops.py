"""A small regression that `fit` trains, for the tests of the loop."""

import json
import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from dpo.training import checkpoint
from dpo.training.log import Log
from dpo.training.loop import fit
from dpo.training.optim import optimizer, schedule


@dataclass(frozen=True)
class Items:
    index: torch.Tensor
    valid: torch.Tensor

    def to(self, device):
        return replace(self, index=self.index.to(device), valid=self.valid.to(device))


class Windows:
    """22 items in windows of 8, 8 and 6, as micro-batches filled up with fillers."""

    def __init__(self, micro_batch_size=8):
        self.size = micro_batch_size

    def __len__(self):
        return 3

    def name(self, row):
        return f"item {row}"

    def at(self, step):
        order = np.random.default_rng(step // 3).permutation(22)[step % 3 * 8 :][:8]
        micro_batches = []
        for first in range(0, len(order), self.size):
            rows = order[first : first + self.size].tolist()
            missing = self.size - len(rows)
            real = torch.tensor([True] * len(rows) + [False] * missing)
            micro_batches.append(Items(torch.tensor(rows + rows[:1] * missing), real))
        return micro_batches, len(order)


class Run:
    """A small regression, trained by `fit` in one directory."""

    def __init__(self, directory, seed=0, micro_batch_size=8):
        torch.manual_seed(seed)
        self.directory, self.seed = directory, seed
        directory.mkdir(exist_ok=True)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 1))
        self.optim = optimizer(self.model, "adamw", 0.05, [0.9, 0.99], 0.0)
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(22, 4, generator=generator)
        self.targets = self.inputs.sum(1).sin()
        self.batches = Windows(micro_batch_size)
        self.steps_begun = 0

    def step(self, batch):
        self.steps_begun += 1
        errors = self.model(self.inputs[batch.index]).squeeze(1).float() - self.targets[batch.index]
        return errors.square(), {"absolute": errors.abs()}

    def fit(self, steps=10, step=None, **options):
        torch.manual_seed(self.seed)
        random.seed(self.seed)
        np.random.seed(self.seed)
        options = {"max_grad_norm": 1.0, "precision": "fp32", "checkpoint_every": 4, **options}
        with Log(self.directory, run_id="toy") as log:
            fit(
                self.model,
                self.batches,
                step or self.step,
                self.optim,
                schedule(self.optim, "linear", 2, steps),
                steps=steps,
                log=log,
                directory=self.directory / "checkpoint",
                **options,
            )

    @property
    def rows(self):
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row.pop("items_per_second", None)
        return rows

    @property
    def saved(self):
        return checkpoint.latest(self.directory / "checkpoint").name

    def evaluate(self, done):
        """Validation rows that use up every random state."""
        noise = torch.rand(()).item(), random.random(), np.random.rand()
        assert not self.model.training
        assert not torch.is_grad_enabled()
        with Log(self.directory, run_id="toy") as log:
            log.write(done, "validation", {"noise": sum(noise)})
