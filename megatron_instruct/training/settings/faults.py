"""Settings of what a run does about signals, bad steps and slow processes."""

import math
from dataclasses import dataclass

from megatron_instruct.errors import ConfigError
from megatron_instruct.training.settings.idle import check_idle


@dataclass(frozen=True, kw_only=True)
class FaultOptions:
    """Ending early, bad steps and slow processes; see docs/operations.md."""

    exit_signal_handler: bool = True
    """On SIGTERM or SIGUSR1 finish the step, save and exit with status 75."""
    exit_duration_in_mins: float | None = None
    """Save and exit with status 75 after the first step that ends so long after the process began (minutes)."""
    exit_interval: int | None = None
    """Save and exit with status 75 after each step that is a multiple of this."""
    loss_spike_factor: float | None = None
    """A step whose loss is above so many times the median of the last loss_spike_window steps is bad, as one that is not finite."""
    loss_spike_window: int = 100
    """Steps of that median; a tenth of them must be there before any loss is called a spike."""
    max_skips_in_a_row: int = 3
    """Bad batches one after another that are skipped before the run goes back to its newest whole checkpoint."""
    max_skips: int = 100
    """Bad batches that are skipped over the whole run before it stops."""
    max_rollbacks: int = 1
    """How often, over the whole run, it goes back to a checkpoint before it stops."""
    straggler_factor: float | None = 2.0
    """A process whose own computation takes so many times the median of all is named."""
    straggler_interval: float = 60.0
    """Seconds between two looks for such a process; a look measures one step."""

    def __post_init__(self) -> None:
        lowest_of = {"exit_interval": 1, "loss_spike_window": 10, "max_skips_in_a_row": 0, "max_skips": 0, "max_rollbacks": 0}
        for name, lowest in lowest_of.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"{name}={value} must be at least {lowest}.")
        for name, above in (("exit_duration_in_mins", 0.0), ("loss_spike_factor", 1.0), ("straggler_factor", 1.0)):
            value = getattr(self, name)
            if value is not None and not above < value < math.inf:
                raise ConfigError(f"{name}={value} must be above {above:g}; leave it out to switch it off.")
        if self.loss_spike_factor is None:
            check_idle(self, ("loss_spike_window",), needs="loss_spike_factor")
        if not 0.0 <= self.straggler_interval < math.inf:
            raise ConfigError(f"straggler_interval={self.straggler_interval} must be 0 or more seconds.")
