"""What the model would write now: greedy continuations of prompts, by the training model itself in its layout.

Comes in: the model chunks as the schedules see them, prompts as token ids. Goes out: token ids, the same on every rank. Each new token is
one whole forward pass of megatron-core's schedule without a cache: slow and exact. Draws no random number, so training goes on as
without. Does not know: when.

Shapes: P prompts, L tokens of the longest prompt and its continuation, V vocabulary without the rows that pad it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import read_lines
from megatron_instruct.tokenizer import Tokenizer

_MULTIPLE = 64
"""Of L, at least: FP8 products take multiples of 16, and compiled kernels few shapes."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts, checked."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    new_tokens: int


def read_prompts(path: Path, tokenizer: Tokenizer, *, new_tokens: int, positions: int) -> Prompts:
    """Read prompts, one a line. Raises InputError for a file without any, ConfigError for one that is too long for the model."""
    if not path.is_file():
        raise InputError(f"sample_prompts={path}: no such file; give a text file with one prompt a line.")
    texts = tuple(line.rstrip("\r\n") for line in read_lines(path) if line.strip())
    if not texts:
        raise InputError(f"sample_prompts={path} holds no prompt; write one a line.")
    ids = tuple(tuple(found) for found in tokenizer.encode_batch(list(texts)))
    for text, found in zip(texts, ids, strict=True):
        if len(found) + new_tokens > positions:
            raise ConfigError(
                f"sample_prompts={path}: {text[:40]!r} has {len(found)} tokens, and with sample_tokens={new_tokens} it is longer than the "
                f"model's {positions} positions; shorten it or lower sample_tokens."
            )
    return Prompts(texts=texts, ids=ids, new_tokens=new_tokens)


def generate(chunks: Sequence[Any], prompts: Prompts, *, end: int, vocab_size: int) -> list[list[int]]:
    """Return the continuation of each prompt, up to the end-of-document token. Every rank calls it."""
    device = next(chunks[0].parameters()).device
    parts = parallel_state.get_tensor_model_parallel_world_size() * parallel_state.get_context_parallel_world_size() * 2
    multiple = math.lcm(_MULTIPLE, parts)
    length = math.ceil((max(map(len, prompts.ids)) + prompts.new_tokens) / multiple) * multiple
    tokens_PL = torch.full((len(prompts.ids), length), end, dtype=torch.long, device=device)
    for row, ids in enumerate(prompts.ids):
        tokens_PL[row, : len(ids)] = torch.tensor(ids, dtype=torch.long, device=device)
    places_P = torch.tensor([len(ids) for ids in prompts.ids], device=device)
    written: list[list[int]] = [[] for _ in prompts.ids]
    done = [False] * len(written)
    for chunk in chunks:
        chunk.eval()
    try:
        for _ in range(prompts.new_tokens):
            next_P = _next_tokens(chunks, tokens_PL, places_P, vocab_size)
            for row, token in enumerate(next_P.tolist()):
                done[row] = done[row] or token == end
                if not done[row]:
                    written[row].append(token)
            if all(done):
                break
            tokens_PL.scatter_(1, places_P[:, None], next_P[:, None])
            places_P = places_P + 1
    finally:
        for chunk in chunks:
            chunk.train()
    return written


@torch.no_grad()
def _next_tokens(chunks: Sequence[Any], tokens_PL: torch.Tensor, places_P: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return [P]: the likeliest token at each place, given those before."""
    count, length = tokens_PL.shape
    positions_PL = torch.arange(length, device=tokens_PL.device).expand(count, length)
    batch = get_batch_on_this_cp_rank(
        {"tokens": tokens_PL, "position_ids": positions_PL.contiguous()},
        is_hybrid_cp=False,
        cp_group=parallel_state.get_context_parallel_group(),
    )
    found = torch.zeros(count, dtype=torch.long, device=tokens_PL.device)

    def forward(_: Any, model: Any) -> tuple[torch.Tensor, Any]:
        logits_PLV = model(batch["tokens"], batch["position_ids"], None)

        def take(output: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
            assert non_loss_data, "the schedule collects outputs"
            held_PL = batch["position_ids"] == places_P[:, None] - 1  # with context parallelism the place may be another rank's
            likeliest_PL = _likeliest(output, vocab_size)
            found.copy_((likeliest_PL * held_PL).sum(dim=1))
            return found

        return logits_PLV, take

    interleaved = len(chunks) > 1
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[None] * len(chunks) if interleaved else None,
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=parallel_state.get_pipeline_model_parallel_world_size() if interleaved else 1,
        seq_length=length,
        micro_batch_size=count,
        forward_only=True,
        collect_non_loss_data=True,
    )
    # only the last pipeline stage has found something, and of its context-parallel ranks the one that holds the place
    torch.distributed.all_reduce(found, group=parallel_state.get_context_parallel_group())
    torch.distributed.all_reduce(found, group=parallel_state.get_pipeline_model_parallel_group())
    return found


def _likeliest(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the argmax over a vocabulary that is divided over the tensor-parallel ranks; of equals the lowest."""
    logits = logits.float()
    first = parallel_state.get_tensor_model_parallel_rank() * logits.size(-1)
    padding = torch.arange(first, first + logits.size(-1), device=logits.device) >= vocab_size
    highest, at = logits.masked_fill(padding, -math.inf).max(dim=-1)
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return at
    group = parallel_state.get_tensor_model_parallel_group()
    values, places = ([torch.empty_like(one) for _ in range(size)] for one in (highest, at))
    torch.distributed.all_gather(values, highest.contiguous(), group=group)
    torch.distributed.all_gather(places, (at + first).contiguous(), group=group)
    best = torch.stack(values).max(dim=0).indices
    return torch.stack(places).gather(0, best[None])[0]
