"""The proof that two models are the same: names, weights, layers, logits, token ids; each a check that passes or fails with its number.

Layers and logits of both sides are computed in fp32 on the CPU from the weights as they were written. Where no weight was rounded, the
sides differ by the order of fp32 sums alone. How far that carries is a property of the model, and it is measured: our side runs a second
sequence, whose values are off by a random part of an epsilon before every layer. The tolerance is how far that moved the results, times
a factor; where weights were rounded to a shorter type, its epsilon takes the place of fp32's.
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_instruct.conversion.mapped import forget_pages
from megatron_instruct.errors import InputError
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.tokenizer import Tokenizer

MAX_TOKENS = 512
"""Length of the text whose logits are compared (tokens)."""
_FACTOR = 8.0  # 2.7 is the most that 60 random models of all families came to, half of them below 0.4; what is wrong is far above

_COMPARED = 1 << 22  # integers that are compared at once

TEXT = """\
A lighthouse keeper writes down what she sees. At 04:15 the wind turns to north-north-west, force 7, and the barometer falls from
1,013 to 996 hectopascals within three hours. Two fishing boats, the "Marguerite" and a smaller one without a name, pass the reef
and do not answer the lamp. She notes their bearing (287 degrees), trims the wick, and drinks cold tea.
What do we learn from such a log? First, that somebody was awake. Second, that weather can be reconstructed: given pressure p and
time t, the slope (996 - 1013) / 3 is about -5.7 hPa an hour, which is steep enough for a gale warning. Third, that a gap in the
record may mean more than an entry; the page for 12 November is missing, and nobody has explained why.
In code, the rule could read: `if slope < -2.0 and hours >= 3: warn("gale")`. In French one would say « avis de grand frais », in
German „Sturmwarnung“, in Japanese 強風警報. The keeper, who spoke none of these languages, simply rang the bell — once for fog,
twice for wind, and a long, long peal when a ship had struck.
"""
"""The text that is compared unless another one is given."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One part of a proof."""

    name: str
    passed: bool
    detail: str
    """What was compared and what was found, for a reader."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The numbers."""


def proof_text(file: Path | None) -> str:
    """Return the text whose logits are compared."""
    if file is None:
        return TEXT
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prove_text {file} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise InputError(f"prove_text {file} is empty; give a text of about 128 tokens or more.")
    return text


def proof_tokens(tokenizer: Tokenizer, architecture: Architecture, text: str) -> list[int]:
    """Return the ids of the text, cut to what the model allows."""
    return tokenizer.encode(text)[: min(MAX_TOKENS, architecture.max_position_embeddings)]


def check_names(*, consumed: int, source: int, filled: int, target: int, set_aside: Sequence[str]) -> Check:
    """Say how many tensors were read and written. (A name that is missing or left over stops the conversion before.)"""
    detail = f"{consumed} of {source} source tensors used, {filled} of {target} target tensors filled"
    detail += f"; {len(set_aside)} follow from others" if set_aside else ""
    passed = consumed + len(set_aside) == source and filled == target
    return Check(name="names", passed=passed, detail=detail, values={"source": source, "target": target, "set_aside": list(set_aside)})


def check_types(stored: Collection[torch.dtype], wanted: torch.dtype) -> Check:
    """Say whether every weight is stored in the wanted type."""
    names = sorted(str(dtype).removeprefix("torch.") for dtype in stored)
    return Check(name="types", passed=set(stored) == {wanted}, detail=f"weights are stored in {', '.join(names)}", values={"types": names})


def check_weights(different: Sequence[str], *, count: int, rounded: str | None) -> Check:
    """Say whether every tensor, read back from the disk and turned round, has the source's bits.

    rounded: the type that the source's weights were rounded to before they were compared, if any.
    """
    detail = f"{count - len(different)} of {count} tensors come back bit for bit"
    detail += f" after rounding to {rounded}" if rounded else ""
    detail += f"; first different: {different[0]}" if different else ""
    return Check(name="weights", passed=not different, detail=detail, values={"tensors": count, "different": list(different)[:20]})


def epsilon_of(rounded_to: torch.dtype | None) -> float:
    """Return the relative rounding of the type that weights were rounded to, or else of fp32, in which both sides compute."""
    return torch.finfo(rounded_to or torch.float32).eps


def check_layer(layer: int, ours: torch.Tensor, theirs: torch.Tensor, *, moved: float) -> Check:
    """Compare the hidden states [S, C] after a layer; moved: how far random rounding of the layers' inputs moved our own."""
    difference = (ours - theirs).abs()
    largest, mean = float(difference.max()), float(difference.mean())
    tolerance = _FACTOR * moved
    detail = f"{ours.size(0)} tokens, max |difference| {largest:.2e}, mean {mean:.2e}, tolerance {tolerance:.2e}"
    values = {"layer": layer, "max": largest, "mean": mean, "tolerance": tolerance, "largest": float(theirs.abs().max())}
    return Check(name=f"layer {layer}", passed=largest <= tolerance, detail=detail, values=values)  # False for NaN


def check_logits(ours: torch.Tensor, theirs: torch.Tensor, *, moved: float) -> Check:
    """Compare the logits [S, V] of both sides; moved: how far random rounding of the layers' inputs moved our own."""
    difference = (ours - theirs).abs()
    largest, mean, scale = float(difference.max()), float(difference.mean()), float(theirs.abs().max())
    tolerance = _FACTOR * moved
    passed = largest <= tolerance  # False for NaN
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    detail = (
        f"{ours.size(0)} tokens, max |difference| {largest:.2e}, mean {mean:.2e}, tolerance {tolerance:.2e}, "
        f"largest logit {scale:.1f}, same best token at {agreement:.1%}"
    )
    values = {"tokens": ours.size(0), "max": largest, "mean": mean, "tolerance": tolerance, "largest": scale, "same_best": agreement}
    return Check(name="logits", passed=passed, detail=detail, values=values)


def check_token_ids(ours: Sequence[int], theirs: Sequence[int], *, kind: str) -> Check:
    """Compare the ids that transformers' AutoTokenizer makes of the text with the source's. kind: the class that it takes."""
    passed = list(theirs) == list(ours)
    detail = f"AutoTokenizer ({kind}) makes {'the same' if passed else 'other'} {len(theirs)} ids of the text"
    if not passed:
        same = next((place for place, (mine, other) in enumerate(zip(ours, theirs, strict=False)) if mine != other), None)
        detail += f", from number {min(len(ours), len(theirs)) if same is None else same} on; the family may have a class of its own there"
    return Check(name="tokenizer", passed=passed, detail=detail, values={"tokens": len(ours), "class": kind})


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one type and shape are the same, bit for bit. (Integers of 64 bits are compared fastest.)

    Of a tensor that stays in its file, no more than 32 MiB are in this process's memory at a time.
    """
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    first, second = left.contiguous().view(-1), right.contiguous().view(-1)
    eight = 8 // left.element_size()
    aligned = not any(flat.numel() % eight or flat.storage_offset() % eight or flat.data_ptr() % 8 for flat in (first, second))
    integers = torch.int64 if aligned else {2: torch.int16, 4: torch.int32}[left.element_size()]
    for mine, other in zip(torch.split(first.view(integers), _COMPARED), torch.split(second.view(integers), _COMPARED), strict=True):
        if not torch.equal(mine, other):
            return False
        if mine.numel() == _COMPARED:
            forget_pages()
    return True


def conclude(checks: Sequence[Check], result: Path) -> dict[str, Any]:
    """Print the proof and return it for the manifest; InputError where a check failed, so that nothing is committed."""
    layers = [check for check in checks if "layer" in check.values]
    for check in checks:
        if check not in layers or not check.passed:
            print(f"{'PASS' if check.passed else 'FAIL'}  {check.name:<10} {check.detail}", flush=True)
        if layers and check is layers[-1]:
            passed = sum(layer.passed for layer in layers)
            worst = max(layers, key=lambda layer: layer.values["max"] / layer.values["tolerance"])
            share = worst.values["max"] / worst.values["tolerance"]
            detail = f"{passed} of {len(layers)} compared layers agree; worst: {worst.name}, {share:.1%} of its tolerance"
            print(f"{'PASS' if passed == len(layers) else 'FAIL'}  {'layers':<10} {detail}", flush=True)
    failed = [check.name for check in checks if not check.passed]
    if failed:
        print(f"FAIL  {result} is not written", file=sys.stderr)
        raise InputError(f"the proof failed ({', '.join(failed)}): the result would not be the same model; {result} is not written.")
    return {"proved": True, "checks": [asdict(check) for check in checks]}


NO_PROOF = {"proved": False, "reason": "--no-prove"}
"""What the manifest says without a proof."""
