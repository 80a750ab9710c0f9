#!/usr/bin/env python
"""torchrun, but its exit status is that of the process that failed first, and what a restart cannot mend is not restarted.

tools/launch.py [flags of torchrun] tools/pretrain.py [flags]
"""

import logging
import sys
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api

from megatron_instruct.errors import LostProcessError
from megatron_instruct.training.stopping import EXIT_TO_GO_ON


class Agent(LocalElasticAgent):
    """Starts again only what ended by a signal or lost another process; torch 2.13 does so after any failure. See docs/operations.md."""

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode >= 0 and failure.exitcode != LostProcessError.exit_status for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def main() -> int:
    """Launch; return the exit status, 128 + the number of a signal that ended a process."""
    api.LocalElasticAgent = Agent  # type: ignore[misc]
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # the processes speak for themselves
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"launch.py: rank {rank} was ended by {failure.signal_name()}; the same command goes on.", file=sys.stderr)
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as stop:  # passed on to the processes, which saved or, where they took too long, go on from the last checkpoint
        print(f"launch.py: {stop.sigval.name} was passed on to the processes, which are gone.", file=sys.stderr)
        return EXIT_TO_GO_ON
    return 0


if __name__ == "__main__":
    sys.exit(main())
