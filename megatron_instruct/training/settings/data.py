"""Settings of the data."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_instruct.config import YamlText
from megatron_instruct.errors import ConfigError, did_you_mean
from megatron_instruct.records import ROLE_CODES
from megatron_instruct.training.phases import parse_phases


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Megatron indexed data sets."""

    data_path: tuple[str, ...] = ()
    """A prefix, several prefixes, or WEIGHT PREFIX pairs; divided by split."""
    split: str = "969,30,1"
    """Shares of data_path for training, validation and test."""
    train_data_path: tuple[str, ...] = ()
    """As data_path, for training only; instead of data_path."""
    phases: tuple[YamlText, ...] = ()
    """Training data that changes on the way, instead of data_path: a list of {until: STEP, 80% or decay, data_path: as data_path}; the
    last one needs no until; lr, min_lr and lr_decay_style (linear, cosine) give a phase a learning rate of its own."""
    valid_data_path: tuple[str, ...] = ()
    """As data_path, for validation only."""
    strict_epochs: bool = False
    """Take every document exactly once in each epoch of its data set, in an order that a longer run begins with, too; phases always do."""
    data_cache_path: Path | None = None
    """Folder of the index caches (default: SAVE/cache). Machines that do not share it build their own."""
    tokenizer_model: Path | None = None
    """Tokenizer folder or file (default: the loaded checkpoint's); must be the one that made the data."""
    adopt_data: bool = False
    """Accept data sets without a manifest, made by another tool with this very tokenizer."""
    eod_mask_loss: bool = False
    """Take no loss at end-of-document tokens in the input."""
    reset_attention_mask: bool = False
    """Attend within documents only; needs data made with --append-eod."""
    reset_position_ids: bool = False
    """Count positions from each document's start. Rotary positions are relative: with reset_attention_mask they are so anyway."""
    role_weights: dict[str, float] = field(default_factory=dict)
    """Weight of the loss by role of the token: ROLE WEIGHT pairs (context, instruction, response, glue, end_of_document); roles not named
    get 0, padding always. Data sets without roles count whole. Default: every token counts 1."""
    num_workers: int = 0
    """Processes that read batches ahead, per rank."""

    @property
    def whole_epochs(self) -> bool:
        """Whether epochs are strict. A phase goes on where another stopped, which an order that depends on a data set's samples forbids."""
        return self.strict_epochs or bool(self.phases)

    def __post_init__(self) -> None:
        if sum(map(bool, (self.data_path, self.train_data_path, self.phases))) != 1:
            raise ConfigError("give either data_path, or train_data_path or phases (with valid_data_path).")
        if self.data_path and self.valid_data_path:
            raise ConfigError("valid_data_path goes with train_data_path or phases; data_path is divided by split.")
        if self.num_workers < 0:
            raise ConfigError(f"num_workers={self.num_workers} must not be negative; 0 reads in the process that trains.")
        if self.reset_position_ids and not self.reset_attention_mask:
            raise ConfigError(
                "reset_position_ids=True changes nothing without reset_attention_mask=True: positions are rotary, and attention sees only "
                "how far two tokens are apart; set reset_attention_mask=True too, or drop reset_position_ids."
            )
        parse_phases(self.phases)
        known = [role for role in ROLE_CODES if role != "padding"]
        for role, weight in self.role_weights.items():
            if role not in known:
                raise ConfigError(f"role_weights: no role {role!r}{did_you_mean(role, known)}")
            if not 0.0 <= weight < float("inf"):
                raise ConfigError(f"role_weights: {role}={weight} must be 0 or a positive number.")
        if self.role_weights and not any(self.role_weights.values()):
            raise ConfigError("role_weights: every weight is 0, so that nothing is learnt; give one role a weight above 0.")
