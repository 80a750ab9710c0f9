"""Parts encoded on a Ray cluster, whose machines all see the input and the output at the same paths.

Comes in: numbered parts. Goes out: one finished folder for each. Ray gives the part of a process or machine that died to another one, a
limited number of times. Does not know: what a part becomes afterwards.
"""

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_instruct.cluster import ray_cluster
from megatron_instruct.corpora.parts import Part
from megatron_instruct.errors import Failure, MegatronInstructError
from megatron_instruct.preprocessing.encode import EncodeJob, PartEncoder

_RETRIES = 3
_AHEAD = 2
"""Parts given out for each core of the cluster, so that none waits for the next one."""


def encode_parts_on_ray(work: Mapping[Path, Part], job: EncodeJob, *, address: str | None, report: Callable[[int], None]) -> None:
    """Encode each part into its folder. report: called with the number of documents done since the last call.

    Raises the first error of a part, and MegatronInstructError for one whose processes keep dying; what was finished is kept.
    """
    with ray_cluster(address) as ray:
        encode = ray.remote(num_cpus=1, max_retries=_RETRIES)(_encode)
        frozen, directory = ray.put(pickle.dumps(job)), Path.cwd()
        waiting = list(work.items())[::-1]
        running: dict[Any, Part] = {}
        most = _AHEAD * max(int(ray.cluster_resources().get("CPU", 1)), 1)
        while waiting or running:
            while waiting and len(running) < most:
                folder, part = waiting.pop()
                running[encode.remote(frozen, part, folder, directory)] = part
            (ended,), _ = ray.wait(list(running), num_returns=1)
            report(_outcome(ray, ended, running.pop(ended)))


def _outcome(ray: Any, reference: Any, part: Part) -> int:
    """Return the number of documents of a part that is done, or raise what stopped it."""
    try:
        outcome: int | Failure = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise MegatronInstructError(
            f"{part} cannot be encoded on the Ray cluster: {error.cause}; "
            "all its machines need this version of Megatron-Instruct and its packages."
        ) from error
    except ray.exceptions.RayError as error:
        raise MegatronInstructError(
            f"the process that encoded {part} died, and so did those in its place ({type(error).__name__}): the machines may be short of "
            "memory. Finished parts are kept: run the same command again to go on."
        ) from error
    if isinstance(outcome, Failure):
        raise outcome.error()
    return outcome


_encoders: dict[bytes, PartEncoder] = {}
"""Of this process, by their job; Ray keeps processes for further parts."""


def _encode(job: bytes, part: Part, folder: Path, directory: Path) -> int | Failure:
    """directory: where the run was started, which its paths are relative to; Ray starts processes elsewhere."""
    try:
        os.chdir(directory)
        if job not in _encoders:
            _encoders.clear()
            _encoders[job] = pickle.loads(job).encoder()
        return _encoders[job].encode(part, folder, lambda _documents: None).documents_in
    except MegatronInstructError as error:
        return Failure(type(error), str(error))
    except OSError as error:
        return Failure(OSError, f"{error} at work on {part} in {folder.parent}")
