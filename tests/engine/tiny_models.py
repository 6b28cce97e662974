"""Tiny random float32 models of many architectures, and a driver that runs prompts through the planner and an engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from mooncake.core.types import AttemptKey, Job, SamplingParams, TokenLogprobs
from mooncake.engine.base import EngineLimits
from mooncake.engine.core import Drawn, EngineCore, SequenceReleased
from mooncake.engine.torch.build import build_from_folder
from mooncake.engine.torch.step_engine import TorchStepEngine

torch.set_num_threads(1)
VOCAB = 199
LIMITS = EngineLimits(num_pages=64, page_tokens=8, block_tokens=16, max_batch=8, max_step_tokens=32, max_context=192)
GREEDY = SamplingParams(temperature=0.0)
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
MLA = {
    **COMMON, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
LINEAR_HYBRID = {
    **GROUPED, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
WINDOW = 11
SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 16}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": WINDOW}),
    "gemma3": ("gemma3_text", {**GROUPED, "head_dim": 16, "sliding_window": WINDOW,
                               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512, "eos_token_id": 1,
                      "bos_token_id": 0}),
    "opt": ("opt", {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi3": ("phi3", GROUPED),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "stablelm": ("stablelm", GROUPED),
    "gpt_neox": ("gpt_neox", COMMON),
    "deepseek_v3": ("deepseek_v3", MLA),
}  # fmt: skip
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("gpt_oss", {**GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
                            "sliding_window": WINDOW}),
    "gemma2": ("gemma2", {**GROUPED, "head_dim": 16, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
    "falcon": ("falcon", {**COMMON, "alibi": False, "multi_query": False, "new_decoder_architecture": False}),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0,
                        "eos_token_id": 1}),
    "mamba2": ("mamba2", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8,
                          "state_size": 8, "n_groups": 1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}),
    "qwen3_next": ("qwen3_next", LINEAR_HYBRID),
    "llama": ("llama", {**GROUPED, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
}  # fmt: skip


def save_model(kind: tuple[str, dict[str, Any]], path: Path) -> Path:
    """Weights of a spread that makes greedy choices clear."""
    name, words = kind
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(name, **words)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(path)
    return path


def tiny_engine(path: Path, limits: EngineLimits = LIMITS) -> TorchStepEngine:
    return build_from_folder(path, "float32", limits)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB) for _ in range(length)] for length in lengths]


def reference(path: Path, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What transformers' own generate says."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
        )
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


class Run:
    """Sequences submitted one after the other, driven step by step. outputs, logprobs: by sequence."""

    def __init__(self, engine: TorchStepEngine, limits: EngineLimits | None = None, *, row_pages: int = 1) -> None:
        self.engine = engine
        self.core = EngineCore(limits or engine.limits, overlap_loads=False, row_pages=row_pages)
        self.outputs: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self.num_steps = 0
        self.fillers: set[int] = set()

    def submit(
        self, prompt: Sequence[int], num_tokens: int, sampling: SamplingParams = GREEDY, num_prompt: int | None = None
    ) -> int:
        seq = len(self.outputs)
        num_prompt = num_prompt or len(prompt)
        self.outputs[seq], self.logprobs[seq] = [], []
        self.engine.add_sequence(seq, prompt, num_prompt, sampling, 0)
        self.core.submit(seq, Job(AttemptKey("t", seq), len(prompt), num_prompt, num_tokens, (), b"", sampling))
        return seq

    def step(self) -> None:
        plan = self.core.schedule()
        assert plan is not None
        self.core.update(plan, self.engine.run(plan, None, {}))
        self.num_steps += 1
        for output in self.core.take_outputs():
            if isinstance(output, Drawn):
                self.outputs[output.seq].extend(output.token_ids)
                self.logprobs[output.seq].extend(output.logprobs)
            elif isinstance(output, SequenceReleased):
                self.engine.remove_sequence(output.seq)
        if not self.fillers:
            self.core.check_integrity()

    def finish(self) -> list[list[int]]:
        while not self.core.idle:
            self.step()
        return list(self.outputs.values())


def scatter(run: Run) -> None:
    """Take every second page for good, so that no sequence gets a run of them."""
    pool = run.core.pool
    holders = range(-pool.num_pages, 0)
    for holder in holders:
        assert pool.allocate(holder, (), pool.page_tokens)
    for holder in holders[::2]:
        pool.free(holder)
    run.fillers = set(holders[1::2])


def generate(
    engine: TorchStepEngine,
    given: Sequence[Sequence[int]],
    num_tokens: int,
    *sampling: SamplingParams,
    row_pages: int = 1,
) -> list[list[int]]:
    """All prompts at once; sampling: of each, the last one for the rest."""
    run = Run(engine, row_pages=row_pages)
    for index, prompt in enumerate(given):
        run.submit(prompt, num_tokens, sampling[min(index, len(sampling) - 1)] if sampling else GREEDY)
    return run.finish()
