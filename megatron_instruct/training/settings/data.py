"""Settings of the data."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from megatron_instruct.config import YamlText
from megatron_instruct.errors import ConfigError, InputError, did_you_mean
from megatron_instruct.files import read_json
from megatron_instruct.records import ROLE_CODES
from megatron_instruct.training.phases import parse_phases


class GivenBlend(NamedTuple):
    """A blend as it was given."""

    field: str
    """The setting that gave it, for messages."""
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Megatron indexed data sets."""

    data_path: tuple[str, ...] = ()
    """A prefix, several prefixes, or WEIGHT PREFIX pairs; divided by split."""
    split: str = "969,30,1"
    """Shares of data_path for training, validation and test. With eval_interval, the last one is evaluated once, after the last step."""
    train_data_path: tuple[str, ...] = ()
    """As data_path, for training only; instead of data_path."""
    phases: tuple[YamlText, ...] = ()
    """Training data that changes on the way, instead of data_path: a list of {until: STEP, 80% or decay, data_path: as data_path}; the
    last one needs no until; lr, min_lr and lr_decay_style (linear, cosine) give a phase a learning rate of its own."""
    valid_data_path: tuple[str, ...] = ()
    """As data_path, for validation only."""
    test_data_path: tuple[str, ...] = ()
    """As data_path, for one evaluation after the last step, of eval_iters global batches."""
    data_args_path: Path | None = None
    """File with the words of data_path, separated by blanks or line ends, where they are too many for a command line."""
    per_split_data_args_path: Path | None = None
    """JSON file with the words of train_data_path, valid_data_path and test_data_path under "train", "valid" and "test", each in a list or
    in one text."""
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

    @property
    def is_divided(self) -> bool:
        """Whether split divides the data."""
        return bool(self.data_path) or self.data_args_path is not None

    @cached_property
    def training_blend(self) -> GivenBlend:
        """What is trained on where there are no phases. Raises InputError for a file that holds no blend."""
        if self.data_args_path is not None:
            return _read_blend(self.data_args_path)
        if self.per_split_data_args_path is not None:
            return _read_share(self.per_split_data_args_path, "train")
        return GivenBlend("data_path", self.data_path) if self.data_path else GivenBlend("train_data_path", self.train_data_path)

    @cached_property
    def validation_blend(self) -> GivenBlend:
        """What is validated on, without words where split or nothing says so. Raises as training_blend does."""
        if self.per_split_data_args_path is not None:
            return _read_share(self.per_split_data_args_path, "valid")
        return GivenBlend("valid_data_path", self.valid_data_path)

    @cached_property
    def test_blend(self) -> GivenBlend:
        """What is tested on, as validation_blend."""
        if self.per_split_data_args_path is not None:
            return _read_share(self.per_split_data_args_path, "test")
        return GivenBlend("test_data_path", self.test_data_path)

    def __post_init__(self) -> None:
        given = (self.data_path, self.train_data_path, self.phases, self.data_args_path, self.per_split_data_args_path)
        if sum(map(bool, given)) != 1:
            raise ConfigError(
                "give one of data_path, train_data_path or phases (with valid_data_path and test_data_path), data_args_path and "
                "per_split_data_args_path."
            )
        for name, use in (("valid_data_path", "validation"), ("test_data_path", "the test")):
            if self.is_divided and getattr(self, name):
                raise ConfigError(f"{name} goes with train_data_path or phases; other data are divided by split.")
            if self.per_split_data_args_path is not None and getattr(self, name):
                raise ConfigError(f"{name} and per_split_data_args_path both give data for {use}; drop one of them.")
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


def _read_blend(path: Path) -> GivenBlend:
    try:
        words = tuple(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data_args_path={path} cannot be read: {error}") from error
    if not words:
        raise InputError(f"data_args_path={path} is empty; write what data_path takes into it, such as 0.3 PREFIX 0.7 PREFIX.")
    return GivenBlend(f"data_args_path={path}", words)


def _read_share(path: Path, share: str) -> GivenBlend:
    content, field = read_json(path), f"per_split_data_args_path={path}, {share!r}"
    shares = ("train", "valid", "test")
    if not isinstance(content, dict) or not content.keys() <= set(shares):
        raise InputError(f"per_split_data_args_path={path} must be a mapping with the keys {', '.join(shares)}.")
    words = content.get(share) or []
    words = words.split() if isinstance(words, str) else words
    if not isinstance(words, list) or any(not isinstance(word, str | int | float) for word in words):
        raise InputError(f"{field}: {words!r} is neither a text nor a list of weights and prefixes.")
    if share == "train" and not words:
        raise InputError(f"{field} has no data to train on; write what train_data_path takes.")
    return GivenBlend(field, tuple(map(str, words)))
