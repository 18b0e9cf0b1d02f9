"""What `benchmarks/step.py` compares: ways to take the same DPO step on the same pairs, from the same weights."""

import contextlib
import copy
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama

from dpo.data.batches import Batch, Pair, balance_by_tokens, collate_responses, size
from dpo.losses import PairLogps, dpo
from dpo.policy.logps import _states, by_sequence, sequence_logps
from dpo.training.loop import autocast
from dpo.training.optim import optimizer

BETA, LR, BETAS = 0.1, 1e-5, (0.9, 0.99)
Logps = Callable[[Any, Batch], Tensor]  # (2B,), chosen then rejected


def model(shape: dict[str, int], vocabulary: int, device: str) -> LlamaForCausalLM:
    """A Llama with random weights, the same ones every time."""
    torch.manual_seed(0)
    sizes = {**shape, "num_key_value_heads": shape["num_attention_heads"], "max_position_embeddings": 2048}
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, use_cache=False, **sizes)
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


class Ours:
    """This project's step: its batches, log-probs, loss and optimizer, with the reference in a table.

    logps and layout can be those of an ablation. micro: tokens of a micro-batch; None: all pairs of a step at once.
    """

    def __init__(
        self,
        policy: LlamaForCausalLM,
        pairs: Sequence[Pair],
        table: Tensor,  # (N, 2) nats
        precision: str,
        micro: int | None,
        layout: str = "shared",
        logps: Logps = lambda policy, batch: sequence_logps(policy, batch)[0],
    ) -> None:
        self.policy, self.pairs, self.table, self.micro, self.layout, self.logps = (
            policy,
            pairs,
            table.to(policy.device),
            micro,
            layout,
            logps,
        )
        self.products = autocast(precision, policy.device)
        self.optimizer = optimizer(policy, "adamw", LR, BETAS, 0.0)

    def step(self, rows: list[int]) -> float:
        self.optimizer.zero_grad()
        sizes = [size(self.pairs[row].prompt_responses) for row in rows]
        total = 0.0
        for share in balance_by_tokens(sizes, self.micro or sum(sizes), 1):
            batch = self._batch([rows[place] for place in share]).to(self.policy.device)
            with self.products:
                ours = self.logps(self.policy, batch).chunk(2)
            theirs = self.table[batch.index].T
            lengths = torch.ones(2, len(share), device=batch.index.device)
            loss = dpo(PairLogps(*ours, *theirs, *lengths), BETA, label_smoothing=0.0).losses.sum() / len(rows)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        return total

    def _batch(self, rows: list[int]) -> Batch:
        some, index = [self.pairs[row] for row in rows], torch.tensor(rows)
        real = torch.ones(len(rows), dtype=torch.bool)
        if self.layout == "packed":  # a row without padding, but every sequence with its own prompt
            both = [(pair.prompt_ids, [pair.chosen_ids]) for pair in some]
            both += [(pair.prompt_ids, [pair.rejected_ids]) for pair in some]
            return collate_responses(both, index, real, packed=True)
        return collate_responses([pair.prompt_responses for pair in some], index, real, packed=self.layout == "shared")


def all_positions(policy: Any, batch: Batch) -> Tensor:
    """The padded forward as it is usually written: log-softmax of all logits, then a mask."""
    output = policy(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    logps = output.logits[:, :-1].float().log_softmax(-1)  # (2B, T-1, V)
    picked = logps.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    mask = torch.zeros(batch.input_ids.numel(), device=picked.device).index_fill(0, batch.target_positions, 1.0)
    return (picked * mask.view(batch.input_ids.shape)[:, :-1]).sum(-1)


def live_reference(policy: Any, batch: Batch) -> Tensor:
    """One more forward in the step; the policy stands in for the reference, whose log-probs are known."""
    with torch.no_grad():
        all_positions(policy, batch)
    return all_positions(policy, batch)


def scored_positions(policy: Any, batch: Batch) -> Tensor:
    """The head only where a token is scored, and plain log-softmax."""
    if batch.shared_prefixes:
        states = _states(policy, batch)
    else:
        output = policy.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        states = output.last_hidden_state.flatten(0, 1)[batch.target_positions]
    logps = policy.lm_head(states).float().log_softmax(-1)
    return by_sequence(logps.gather(-1, batch.labels[:, None]).squeeze(-1), batch)


ABLATION: dict[str, tuple[str, Logps]] = {
    "plain padded forward, live reference": ("padded", live_reference),
    "+ reference in a table": ("padded", all_positions),
    "+ scored positions only": ("padded", scored_positions),
    "+ no padding": ("packed", scored_positions),
    "+ prompt shared": ("shared", scored_positions),
}


class Trl:
    """A step of `trl.DPOTrainer`: its collator, `training_step` and optimizer arguments, driven from outside.

    live: score the reference in the step instead of ahead of it. compact: its head for CUDA, which leaves unscored
    positions out, wherever it runs. liger: Liger's layers in place of the library's. micro: pairs at once.
    table: (N, 2), the reference's log-probs if they are known.
    """

    def __init__(
        self,
        policy: LlamaForCausalLM,
        pairs: Sequence[Pair],
        precision: str,
        micro: int,
        live: bool = False,
        compact: bool = False,
        liger: bool = False,
        table: Tensor | None = None,
    ) -> None:
        import datasets
        import trl.trainer.utils
        from trl import DPOConfig, DPOTrainer

        class OnTokens(DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset

            def _precompute_ref_logps(self, dataset: Any, *given: Any) -> Any:
                if table is None:
                    return super()._precompute_ref_logps(dataset, *given)
                for side, logps in zip(("chosen", "rejected"), table.T.tolist(), strict=True):
                    dataset = dataset.add_column(f"ref_{side}_logps", logps)
                return dataset

        datasets.disable_progress_bars()
        self.compact, self.kernels, self.micro = compact, trl.trainer.utils, micro
        self.default = self.kernels._use_triton
        data = datasets.Dataset.from_list(
            [{"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids} for p in pairs]
        )
        with tempfile.TemporaryDirectory() as directory, self._head(), contextlib.redirect_stderr(io.StringIO()):
            arguments = DPOConfig(
                output_dir=directory,
                beta=BETA,
                per_device_train_batch_size=micro,
                precompute_ref_log_probs=not live,
                max_length=None,
                gradient_checkpointing=False,
                bf16=precision == "bf16",
                use_cpu=policy.device.type == "cpu",
                dataloader_pin_memory=False,
                report_to=[],
                disable_tqdm=True,
            )
            began = time.perf_counter()
            self.trainer = OnTokens(
                policy,
                ref_model=copy.deepcopy(policy) if live else None,
                args=arguments,
                train_dataset=data,
                processing_class=_tokenizer(),
            )
            self.trainer.accelerator.prepare_model(policy)  # as when its loop begins: bf16 is a wrapper of the forward
            self.prepared = time.perf_counter() - began  # the reference is scored here, unless it is live
        self.data, self.policy = self.trainer.train_dataset, policy
        self.rotate = modeling_llama.apply_rotary_pos_emb
        if liger:  # as the trainer does when its loop begins; which changes more than this model
            from transformers.integrations.liger import apply_liger_kernel

            former = dict(vars(modeling_llama))
            apply_liger_kernel(policy, {"fused_linear_cross_entropy": False})
            self.rotate = modeling_llama.apply_rotary_pos_emb
            vars(modeling_llama).update(former)
        self.optimizer = optimizer(policy, "adamw", LR, BETAS, 0.0)

    def step(self, rows: list[int]) -> float:
        trainer: Any = self.trainer
        self.optimizer.zero_grad()
        shares = [rows[first : first + self.micro] for first in range(0, len(rows), self.micro)]
        trainer.current_gradient_accumulation_steps = len(shares)
        with self._head(), self._rotation(self.rotate):
            losses = [
                trainer.training_step(self.policy, trainer.data_collator([self.data[row] for row in share])).item()
                for share in shares
            ]
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        return sum(losses)

    @staticmethod
    @contextlib.contextmanager
    def _rotation(rotate: Any) -> Any:
        former, modeling_llama.apply_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb, rotate
        try:
            yield
        finally:
            modeling_llama.apply_rotary_pos_emb = former

    @contextlib.contextmanager
    def _head(self) -> Any:
        self.kernels._use_triton = (lambda _: True) if self.compact else self.default
        try:
            yield
        finally:
            self.kernels._use_triton = self.default


def _tokenizer() -> PreTrainedTokenizerFast:
    """Any: the pairs are tokens already."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
