"""A step, and what is done where it is bad: its loss or gradient is not finite, or its loss is a spike.

In this order, each bounded by a setting: the same batch again (the same numbers, if no machine erred), without the batch, back to the
newest whole checkpoint without the batches since, the end with a diagnosis. A bad step never changes weights or optimizer. All ranks
agree before any of them does anything. Comes in: microbatches. Goes out: the result, or None for a batch that was left out; every
decision in the ledger, which a run that goes on follows without trying again.
"""

import contextlib
import math
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_instruct.errors import TrainingError
from megatron_instruct.files import read_json, write_json
from megatron_instruct.models.batches import BatchPlan
from megatron_instruct.models.random_streams import random_states, set_random_states
from megatron_instruct.training.expert_losses import expert_losses, restore_expert_losses, scale_expert_losses
from megatron_instruct.training.first_fault import Fault, Faults
from megatron_instruct.training.ledger import Ledger
from megatron_instruct.training.pieces import pieces
from megatron_instruct.training.rehearsal import happening, rehearsed
from megatron_instruct.training.settings.faults import FaultOptions
from megatron_instruct.training.step import (
    REMEDY,
    StepResult,
    StepShape,
    compute_gradients,
    gradient_is_finite,
    share_that_counts,
    update,
)
from megatron_instruct.training.stragglers import OwnTime, gathered, slow_ranks
from megatron_instruct.training.streams import Replayable

LOSSES_FILE = "recent_losses.json"
"""In --save with loss_spike_factor: for each of the newest checkpoints the losses before it, which the next spike is judged by."""
_KEPT_CHECKPOINTS = 50
_MOST_EMPTY_IN_A_ROW = 50
"""Steps without a token that counts in the loss, which are left out; after so many it is no chance."""
_DOCUMENTS = 20
"""Most pieces of documents that an event names; tools/trace_data.py names them all."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a step, the same on every rank."""

    result: StepResult | None
    """None where its batch was left out."""
    checkpoint: int | None
    """Iteration that the weights went back to; None where they did not."""
    exit_code: int
    """Highest request to end (training.stopping) of all ranks."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the steps work on."""

    models: Sequence[Any]
    chunks: Sequence[Any]
    optimizer: Any
    train_set: Any
    plan: BatchPlan
    save: Path
    device: torch.device


class Steps:
    """The steps of one run, on one rank."""

    def __init__(
        self, options: FaultOptions, ledger: Ledger, of: Trained, *, start_iteration: int, go_back: Callable[[], int | None]
    ) -> None:
        """go_back: loads the newest whole checkpoint and returns its iteration, or None where there is none. Collective."""
        self._options, self._ledger, self._of, self._go_back = options, ledger, of, go_back
        self._rehearsed = rehearsed()
        self._first = torch.distributed.get_rank() == 0
        self._losses: dict[str, list[float]] = self._read_losses()
        self._recent = self._recent_at(start_iteration)
        self._own_time = OwnTime(of.device)
        self._looked, self._look = time.monotonic(), False
        self._slow, self._suspected = set[int](), set[int]()
        if self._rehearsed and self._first:
            print(f"REHEARSAL: {len(self._rehearsed)} faults are made on purpose.", flush=True)

    def step(self, iteration: int, streams: Sequence[Replayable], shape: StepShape, request: Callable[[int], int]) -> Outcome:
        """Do a step, or what must be done instead. Raises TrainingError with the diagnosis where nothing is left to try.

        request: returns what this process was asked, when the step is computed (training.stopping).
        """
        if self._ledger.leaves_out(iteration) or (shape.leaves_tokens_out and self._counts_for_nothing(iteration, streams[0], shape)):
            for stream in streams:
                stream.leave_out(shape.num_microbatches)
            return Outcome(result=None, checkpoint=None, exit_code=0)
        before, watch, reasons = self._state(), Faults(self._of.models), list[str]()
        for attempt in (1, 2):
            with contextlib.ExitStack() as looking:
                if self._look and attempt == 1:
                    looking.enter_context(self._own_time.measuring(self._of.models))
                looking.enter_context(happening(self._rehearsed, self._of.models, iteration, attempt))
                if attempt == 2:
                    looking.enter_context(watch.watching())
                loss = compute_gradients(self._of.chunks, self._of.optimizer, streams, shape)
            if self._look and attempt == 1:
                self._name_slow_ranks(iteration)
            reason, exit_code = self._agree(loss, request(iteration))
            if reason is None:
                break
            reasons.append(reason)
            self._restore(before)
            for stream in streams:
                stream.rewind()
        if len(reasons) == 2:
            for stream in streams:
                stream.leave_out(shape.num_microbatches)
            return Outcome(result=None, checkpoint=self._leave_out(iteration, reasons[1], watch.first()), exit_code=exit_code)
        for stream in streams:
            stream.done()
        if reasons:
            text = f"step {iteration}: {reasons[0]}; on the same batch again it is {loss:.4f}: a passing fault of a machine."
            self._ledger.add("rerun", iteration, text, reason=reasons[0])
        self._recent.append(loss)
        return Outcome(result=update(self._of.optimizer, loss), checkpoint=None, exit_code=exit_code)

    def _counts_for_nothing(self, iteration: int, stream: Replayable, shape: StepShape) -> bool:
        """Say whether no token of a step counts in the loss, which is then recorded. Collective."""
        share, model = share_that_counts(stream.peek(shape.num_microbatches)), self._of.models[0].config
        if share:
            if model.num_moe_experts is not None:
                scale_expert_losses(model, share)
            return False
        if self._ledger.steps("empty").issuperset(range(iteration - _MOST_EMPTY_IN_A_ROW, iteration)):
            raise TrainingError(
                f"step {iteration}: no token of its batch counts in the loss, nor in the {_MOST_EMPTY_IN_A_ROW} steps before it; "
                "give another role a weight in role_weights, or raise global_batch_size."
            )
        text = f"step {iteration}: no token of its batch counts in the loss; it is left out."
        self._ledger.add("empty", iteration, text, documents=self._documents(iteration, None))
        return True

    def remember(self, iteration: int) -> None:
        """Keep what a run that goes on from this checkpoint needs to judge spikes alike. To be called before the checkpoint is saved."""
        if self._options.loss_spike_factor is None:
            return
        kept = {**self._losses, str(iteration): list(self._recent)}
        self._losses = dict(sorted(kept.items(), key=lambda entry: int(entry[0]))[-_KEPT_CHECKPOINTS:])
        if self._first:
            write_json(self._of.save / LOSSES_FILE, self._losses)

    def _agree(self, loss: float, exit_code: int) -> tuple[str | None, int]:
        """Return what is bad on any rank, and the highest request to end."""
        options, finite = self._options, math.isfinite(loss)
        gradient = not finite or gradient_is_finite(self._of.chunks, self._of.optimizer)
        typical = self._typical()
        factor = options.loss_spike_factor
        spike = finite and typical is not None and factor is not None and loss > factor * typical
        due = self._first and options.straggler_factor is not None and time.monotonic() - self._looked >= options.straggler_interval
        flags = torch.tensor([not finite, not gradient, spike, exit_code, due], dtype=torch.int32, device=self._of.device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        bad_loss, bad_gradient, spiky, exit_code, self._look = flags.tolist()
        if bad_loss:
            return f"the loss is {'not finite' if finite else loss}", exit_code
        if bad_gradient:
            return f"the gradient is not finite at a loss of {loss:.4f}", exit_code
        if spiky and typical is not None:
            return f"the loss {loss:.4f} is {loss / typical:.1f} times the median {typical:.4f} of the steps before", exit_code
        return None, exit_code

    def _typical(self) -> float | None:
        enough = len(self._recent) >= max(1, self._options.loss_spike_window // 10)
        return statistics.median(self._recent) if self._options.loss_spike_factor is not None and enough else None

    def _leave_out(self, iteration: int, reason: str, fault: Fault | None) -> int | None:
        """Skip the batch, or go back and return to where, or end the run."""
        options, ledger = self._options, self._ledger
        where = f"; first not finite: {fault.text}" if fault is not None else ""
        documents = self._documents(iteration, fault)
        details = {"reason": reason, "where": fault.text if fault is not None else None, "documents": documents}
        skipped = ledger.skipped
        in_a_row = next(count for count in range(iteration + 1) if iteration - 1 - count not in skipped)
        blames_batch = fault is None or not fault.of_weights
        if blames_batch and in_a_row < options.max_skips_in_a_row and len(skipped) < options.max_skips:
            of_all = f"{len(skipped) + 1} of {options.max_skips}"
            text = f"step {iteration}: {reason}, twice on the same batch{where}; the batch is skipped ({of_all})."
            ledger.add("skip", iteration, text, **details)
            return None
        rollbacks = ledger.count("rollback")
        checkpoint = self._go_back() if rollbacks < options.max_rollbacks else None
        if checkpoint is not None:
            self._recent = self._recent_at(checkpoint)
            text = (
                f"step {iteration}: {reason}{where}; back to the weights of step {checkpoint}, without the batches since "
                f"({rollbacks + 1} of {options.max_rollbacks})."
            )
            ledger.add("rollback", iteration, text, checkpoint=checkpoint, **details)
            return checkpoint
        tried = (
            f"{in_a_row} batches before it were skipped (max_skips_in_a_row={options.max_skips_in_a_row}, {len(skipped)} in all, "
            f"max_skips={options.max_skips}) and the run went back {rollbacks} times (max_rollbacks={options.max_rollbacks}"
            f"{'' if rollbacks >= options.max_rollbacks else ', and there is no whole checkpoint'})"
        )
        named = "; ".join(documents) or "none"
        raise TrainingError(
            f"step {iteration} cannot be done: {reason}, twice on the same batch{where}. {tried}. Its documents: {named} (all of them: "
            f"tools/trace_data.py --save {self._of.save} --iterations {iteration}). If they are sound, {REMEDY}"
        )

    def _documents(self, iteration: int, fault: Fault | None) -> list[str]:
        """Return the pieces of documents of the microbatch at fault where it is known, else of the batch; the first ones."""
        plan = self._of.plan
        first, end = plan.samples_before(iteration - 1), plan.samples_before(iteration)
        if fault is not None and fault.names_microbatch:
            first += (fault.microbatch * plan.data_parallel + fault.data_rank) * plan.micro_batch_size
            end = first + plan.micro_batch_size
        found: list[str] = []
        for number in range(first, end):
            found += map(str, pieces(self._of.train_set, number))
            if len(found) >= _DOCUMENTS:
                break
        return found[:_DOCUMENTS]

    def _name_slow_ranks(self, iteration: int) -> None:
        """Tell who is slow, and who no longer is. Collective."""
        self._looked, self._look = time.monotonic(), False
        seconds = gathered(self._own_time.seconds(), self._of.device)
        found = slow_ranks(seconds, self._options.straggler_factor or math.inf)
        slow = {rank: times for rank, times in found.items() if rank in self._suspected}  # once may be chance
        self._suspected = set(found)
        if slow.keys() == self._slow:
            return
        hosts: list[Any] = [None] * len(seconds)
        torch.distributed.all_gather_object(hosts, platform.node())
        named = "; ".join(
            f"rank {rank} on {hosts[rank]} is slow: its own computation takes {times:.1f} times the median ({1000 * seconds[rank]:.1f} ms)"
            for rank, times in slow.items()
        )
        caught_up = "; ".join(f"rank {rank} on {hosts[rank]} keeps pace again" for rank in sorted(self._slow - slow.keys()))
        self._slow = set(slow)
        self._ledger.add("straggler", iteration, f"step {iteration}: {'; '.join(filter(None, (named, caught_up)))}.", ranks=sorted(slow))

    def _state(self) -> dict[str, Any]:
        """Return what a step changes besides weights and optimizer: random streams, and what the router of experts counts."""
        return {
            "random": random_states(),
            "expert_losses": expert_losses(),
            "buffers": [
                [buffer.clone() for buffer in model.buffers()] if model.config.num_moe_experts else [] for model in self._of.models
            ],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        set_random_states(state["random"])
        restore_expert_losses(state["expert_losses"])
        for model, buffers in zip(self._of.models, state["buffers"], strict=True):
            for buffer, kept in zip(model.buffers() if buffers else (), buffers, strict=True):
                buffer.copy_(kept)

    def _read_losses(self) -> dict[str, list[float]]:
        path = self._of.save / LOSSES_FILE
        read: list[Any] = [read_json(path) if self._first and self._options.loss_spike_factor is not None and path.is_file() else {}]
        torch.distributed.broadcast_object_list(read, src=0)
        return dict(read[0])

    def _recent_at(self, iteration: int) -> deque[float]:
        return deque(self._losses.get(str(iteration), ()), maxlen=self._options.loss_spike_window)
