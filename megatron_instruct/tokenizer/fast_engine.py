"""gigatoken's own form of a tokenizer: a tokenizer.json without special tokens, so that text which spells one stays ordinary text.

Comes in: a loaded tokenizer. Goes out: that content, or a reason why there is none. That its ids are right is for fast_proof.py.
Does not know: gigatoken. Source of the merges: a sentencepiece BPE model joins, of all neighbours that form a piece, those whose piece
has the highest score (sentencepiece, bpe_model.cc).
"""

import base64
from pathlib import Path
from typing import Any

from megatron_instruct.errors import ConfigError, MissingPackageError
from megatron_instruct.files import read_json
from megatron_instruct.tokenizer.huggingface import HuggingFaceTokenizer
from megatron_instruct.tokenizer.protocol import Tokenizer
from megatron_instruct.tokenizer.sentencepiece_model import SentencePieceTokenizer

_NORMAL, _USER_DEFINED = 1, 4
_BPE = 2


class NoFastFormError(ConfigError):
    """The tokenizer is of a kind that gigatoken has no form for; the message says which."""


def fast_form(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of a tokenizer.json with the ids of `tokenizer` and no special tokens, or raise NoFastFormError."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _without_special_tokens(read_json(tokenizer.file))
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _from_sentencepiece(tokenizer.file)
    raise NoFastFormError(f"it is a {tokenizer.kind}; gigatoken is used for tokenizer.json and sentencepiece .model files")


def _without_special_tokens(content: dict[str, Any]) -> dict[str, Any]:
    ordinary = [token for token in content.get("added_tokens") or [] if not token.get("special")]
    return {**content, "added_tokens": ordinary, "post_processor": None, "truncation": None, "padding": None}


def _from_sentencepiece(file: Path) -> dict[str, Any]:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise MissingPackageError("protobuf", extra="fast", purpose=f"gigatoken with {file}") from error
    model: Any = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    trainer, spec = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != _BPE or not trainer.byte_fallback:
        raise NoFastFormError("it is a sentencepiece model without BPE or without a piece for each byte")
    if not spec.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        raise NoFastFormError("it is a sentencepiece model that does not write a space as '▁' before a word")
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": piece.piece, "special": False, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for number, piece in enumerate(model.pieces)
            if piece.type == _USER_DEFINED
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(spec)},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": trainer.unk_piece,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece.piece: number for number, piece in enumerate(model.pieces)},
            "merges": _merges(model.pieces),
        },
    }


def _normalizers(spec: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec.precompiled_charsmap).decode()})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": "▁"})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]


def _merges(pieces: Any) -> list[str]:
    """Return every way to join two normal pieces into a third, the highest score first.

    Of equal scores sentencepiece takes the leftmost in the text, so that a run, such as one of spaces, grows from its left: the way with
    the longer left piece comes first.
    """
    normal = [(piece.piece, piece.score, number) for number, piece in enumerate(pieces) if piece.type == _NORMAL]
    numbers = {piece: number for piece, _, number in normal}
    ways: list[tuple[float, int, int, int, int, str]] = []
    for whole, score, _ in normal:
        for cut in range(1, len(whole)):
            left = whole[:cut]
            if left in numbers and (right := whole[cut:]) in numbers:
                ways.append((-score, -cut, cut - len(whole), numbers[left], numbers[right], f"{left} {right}"))
    return [way for *_, way in sorted(ways)]
