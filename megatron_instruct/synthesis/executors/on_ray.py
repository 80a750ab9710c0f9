"""Workers as Ray actors, on every machine of a Ray cluster, with a file system that all machines share.

Each actor owns an engine, and as many GPUs as one model is divided over; one more actor, without a claim on anything, gives out the shards.
An actor that dies gives its shards back and is replaced, a limited number of times.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_instruct.cluster import ray_cluster
from megatron_instruct.errors import ConfigError, EngineError, Failure, MegatronInstructError
from megatron_instruct.synthesis.dispatch import Dispatch
from megatron_instruct.synthesis.worker import Assignment, NextShard, Report, Worker

_SECONDS = 1.0
"""Between two looks at what was reported."""


def run_on_ray(assignment: Assignment, shards: Sequence[int], report: Callable[[Report], None]) -> None:
    """Make the shards. report: called with what was done since the last call.

    Raises EngineError, ConfigError and what else stops a worker; what was finished is kept.
    """
    with ray_cluster(assignment.config.ray_address) as ray:
        _Actors(ray, assignment, shards).run(report)


class _Actors:
    """The actors, and the references by which it is known when they end."""

    def __init__(self, ray: Any, assignment: Assignment, shards: Sequence[int]) -> None:
        self._ray, self._assignment = ray, assignment
        self._dispatch = ray.remote(num_cpus=0)(Dispatch).remote(shards)
        config = assignment.config
        needs: dict[str, Any] = {"num_cpus": config.vllm.threads or 1}
        if config.engine == "vllm" and ray.cluster_resources().get("GPU", 0):
            needs["num_gpus"] = config.vllm.tensor_parallel_size
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(needs["num_cpus"])}
        self._actor = ray.remote(**needs, runtime_env={"env_vars": environment})(_Actor)
        self._check(needs)
        self._running: dict[Any, int] = {}
        self._deaths = 0

    def _check(self, needs: dict[str, Any]) -> None:
        """An actor that no machine has room for would be waited for without end."""
        replicas = self._assignment.config.replicas
        there = self._ray.cluster_resources()
        for resource, each in (("CPU", needs["num_cpus"]), ("GPU", needs.get("num_gpus", 0))):
            if replicas * each > there.get(resource, 0):
                raise ConfigError(
                    f"replicas={replicas} need {replicas * each} {resource}s of the Ray cluster, which has {there.get(resource, 0):g}; "
                    "lower replicas, or add machines."
                )

    def run(self, report: Callable[[Report], None]) -> None:
        try:
            self._run(report)
        except self._ray.exceptions.RayActorError as error:  # that of a worker is met in _end
            raise EngineError("the actor that gives out the shards died; what was finished is kept: run the same command again.") from error

    def _run(self, report: Callable[[Report], None]) -> None:
        for worker in range(self._assignment.config.replicas):
            self._start(worker)
        while self._running:
            ended, _ = self._ray.wait(list(self._running), timeout=_SECONDS)
            for reference in ended:
                self._end(reference, self._running.pop(reference))
            report(self._ray.get(self._dispatch.reported.remote()))

    def _start(self, worker: int) -> None:
        actor = self._actor.remote(self._assignment, self._dispatch, worker, Path.cwd())
        self._running[actor.run.remote()] = worker

    def _end(self, reference: Any, worker: int) -> None:
        """See whether an actor's work is done, or the actor."""
        try:
            failure = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._deaths += 1
            restarts = self._assignment.config.restarts
            shards = self._ray.get(self._dispatch.take_back.remote(worker))
            if self._deaths > restarts:
                raise EngineError(f"worker {worker} died, after {restarts} others were replaced; what was finished is kept.") from error
            print(
                f"worker {worker} died; it is replaced ({self._deaths} of {restarts}), its {shards} shards are taken up again.",
                file=sys.stderr,
                flush=True,
            )
            self._start(worker)
            return
        if failure is not None:
            raise failure.error(of=f"worker {worker}: ")


class _Actor:
    """One worker, in a process that Ray starts."""

    def __init__(self, assignment: Assignment, dispatch: Any, worker: int, directory: Path) -> None:
        """directory: where the run was started, which its paths are relative to; Ray starts processes elsewhere."""
        self._assignment, self._dispatch, self._worker, self._directory = assignment, dispatch, worker, directory

    def run(self) -> Failure | None:
        """Return why it gave up, and the exit status of that; None when there was nothing left to do."""
        import ray

        def next_shard() -> NextShard | None:
            shard: NextShard | None = ray.get(self._dispatch.next_shard.remote(self._worker))
            return shard

        def report(what: Report) -> None:
            self._dispatch.report.remote(self._worker, what)

        try:
            os.chdir(self._directory)
            Worker(self._assignment, next_shard, report).run()
        except MegatronInstructError as error:
            return Failure(type(error), str(error))
        except OSError as error:  # a full disk, say: no actor that took its place would fare better
            return Failure(MegatronInstructError, str(error))
        return None
