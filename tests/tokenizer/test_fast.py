"""gigatoken in the library's place: only where it is proved to give the same ids; loud where it is not."""

import builtins
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from megatron_instruct.errors import ConfigError, MissingPackageError
from megatron_instruct.tokenizer import Tokenizer, fast, fast_tokenizer, load_tokenizer, with_fast_backend
from megatron_instruct.tokenizer.fast_engine import fast_form

NASTY = [
    "",
    " ",
    "</s> <s>x</s><unk> [INST] <|endoftext|>",
    "  lead\n\n\t trail  ",
    "a" + " " * 33 + "b\n" + "=" * 77,
    "漢字 😀👩‍👩‍👧 e\u0301 ﬁ ½",
    "\0\x07\ufeff\u200b\u2028 ▁▁ <0x0A>",
]


def mistral_v1() -> Path:
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.origin is not None, "requirements/base.txt has mistral-common"
    return Path(spec.origin).parent / "data" / "tokenizer.model.v1"


@pytest.fixture(scope="module")
def mistral() -> Tokenizer:
    return load_tokenizer(mistral_v1())


@pytest.fixture(scope="module")
def texts(jargon: list[dict[str, str]]) -> list[str]:
    return [*(row["text"] for row in jargon[::3]), *NASTY]


def test_ids_and_ends_are_those_of_sentencepiece(mistral: Tokenizer, texts: list[str]) -> None:
    backend = with_fast_backend(mistral, texts, choice="gigatoken")
    expected, found = (tokenizer.encode_flat(texts, ends=True) for tokenizer in (mistral, backend.tokenizer))
    assert expected.ends is not None and found.ends is not None
    for right, wrong in ((expected.ids, found.ids), (expected.lengths, found.lengths), (expected.ends, found.ends)):
        assert right.dtype == wrong.dtype
        assert np.array_equal(right, wrong)
    assert not {mistral.eod, mistral.bos} & set(found.ids.tolist()), "text that spells a special token is ordinary text"
    assert backend.facts == {
        "backend": "gigatoken 0.10.0",
        "proved_texts": len(texts),
        "proved_bytes": sum(len(text.encode()) for text in texts),
    }
    same = ("kind", "vocab_size", "eod", "bos", "fingerprint")
    assert [getattr(backend.tokenizer, name) for name in same] == [getattr(mistral, name) for name in same]
    assert backend.tokenizer.encode_batch(NASTY) == mistral.encode_batch(NASTY)
    assert backend.tokenizer.decode(backend.tokenizer.encode("a b")) == "a b"


@pytest.mark.parametrize("empty", [[], [""], ["", ""]])
def test_no_text_and_empty_texts_give_empty_arrays(mistral: Tokenizer, empty: list[str]) -> None:
    flat = fast_tokenizer(mistral).encode_flat(empty, ends=True)
    assert (flat.lengths.tolist(), len(flat.ids)) == ([0] * len(empty), 0)
    assert (flat.ids.dtype, flat.lengths.dtype) == (np.uint16, np.int32)


def test_a_byte_level_tokenizer_keeps_its_added_tokens_and_loses_its_special_ones(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "t")
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    model.add_tokens(["<extra>"])
    model.add_special_tokens(["<|special|>"])
    model.save(str(tmp_path / "t" / "tokenizer.json"))
    library = load_tokenizer(tmp_path / "t")
    sample = [*NASTY, "one <extra> two<extra>", "a <|special|> b <|endoftext|>"]
    found = with_fast_backend(library, sample, choice="gigatoken").tokenizer.encode_flat(sample, ends=True)
    expected = library.encode_flat(sample, ends=True)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.ends is not None and expected.ends is not None
    assert found.ends.tolist() == expected.ends.tolist()


@pytest.fixture
def other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give gigatoken the merges of equal score in another order, which changes long runs of spaces and nothing else."""

    def wrong_form(tokenizer: Tokenizer) -> dict[str, Any]:
        content = fast_form(tokenizer)
        model = content["model"]
        is_run = [not way.strip("▁ ") for way in model["merges"]]
        runs = [way for way, run in zip(model["merges"], is_run, strict=True) if run]
        runs.sort(key=lambda way: [model["vocab"][piece] for piece in way.split(" ")])
        model["merges"] = [runs.pop(0) if run else way for way, run in zip(model["merges"], is_run, strict=True)]
        return content

    monkeypatch.setattr(fast, "fast_form", wrong_form)


DIFFERENT = ["the same", "the same again", f"not the same{' ' * 46}at all", "end"]


@pytest.mark.usefixtures("other_order")
def test_other_ids_are_refused_with_the_first_text_that_differs(mistral: Tokenizer) -> None:
    right = mistral.encode(DIFFERENT[2])
    with pytest.raises(ConfigError) as caught:
        with_fast_backend(mistral, DIFFERENT, choice="gigatoken")
    message = str(caught.value)
    assert "text 2 of 4 in the sample" in message and repr(DIFFERENT[2]) in message and "--fast-tokenizer none" in message
    shown = [json.loads(part[: part.index("]") + 1]) for part in (message.split(name)[1] for name in ("the library ", ", gigatoken "))]
    assert shown[0] == right[: len(shown[0])] and shown[1] != shown[0]


@pytest.mark.usefixtures("other_order")
def test_other_ids_make_auto_fall_back_loudly(mistral: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    backend = with_fast_backend(mistral, DIFFERENT)
    assert backend.tokenizer is mistral
    assert (backend.facts["backend"], "text 2 of 4" in backend.facts["reason"]) == ("library", True)
    assert "gigatoken is not used, the slower library is: gigatoken gives other ids" in capsys.readouterr().out


def test_a_sample_without_the_difference_is_not_enough(mistral: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Special tokens and unusual characters are compared whatever the sample holds."""

    def with_special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
        content = fast_form(tokenizer)
        token = {"id": 2, "content": "</s>", "special": True, "normalized": False}
        content["added_tokens"] = [token | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)]
        return content

    monkeypatch.setattr(fast, "fast_form", with_special_tokens)
    with pytest.raises(ConfigError, match=r"of the built-in ones.*</s>"):
        with_fast_backend(mistral, ["plain"], choice="gigatoken")


def test_kinds_without_a_form_and_a_missing_package_fall_back_or_are_named(
    mistral: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tekken = load_tokenizer(mistral_v1().with_name("tekken_240911.json"))
    assert with_fast_backend(tekken, ["x"]).facts["reason"].startswith("it is a TikTokenizer")
    with pytest.raises(ConfigError, match="TikTokenizer"):
        fast_tokenizer(tekken)
    with pytest.raises(ConfigError, match="TikTokenizer"):
        with_fast_backend(tekken, ["x"], choice="gigatoken")
    found = builtins.__import__

    def without_gigatoken(name: str, *rest: Any, **named: Any) -> Any:
        if name == "gigatoken":
            raise ImportError(name)
        return found(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_gigatoken)
    assert with_fast_backend(mistral, ["x"]).tokenizer is mistral
    assert "megatron-instruct[fast]" in capsys.readouterr().out
    with pytest.raises(MissingPackageError, match=r"megatron-instruct\[fast\]"):
        with_fast_backend(mistral, ["x"], choice="gigatoken")
    assert with_fast_backend(mistral, ["x"], choice="none").facts == {"backend": "library", "reason": "asked for"}


def without_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "compiled", lambda: None)


@pytest.mark.parametrize("segments", [True, False])
def test_gigatoken_is_loaded_anew_after_so_many_characters_and_gives_the_same_ids(
    mistral: Tokenizer, monkeypatch: pytest.MonkeyPatch, *, segments: bool
) -> None:
    if not segments:
        without_segments(monkeypatch)
    monkeypatch.setattr(fast, "_NEW_SEGMENTS" if segments else "_RENEWED_AFTER", 20)
    tokenizer = fast_tokenizer(mistral)
    engine = tokenizer._engine
    for texts in (["a word " * 10], ["another one, unlike those before it", ""], ["a word", "ähnlich"]):
        expected, found = mistral.encode_flat(texts), tokenizer.encode_flat(texts)
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.lengths.tolist() == expected.lengths.tolist()
    assert tokenizer._engine is not engine


def test_many_short_texts_get_the_ids_that_they_get_one_by_one(mistral: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    without_segments(monkeypatch)
    texts = [f"{number} Wörter, 漢字" * (number % 3) for number in range(2000)]
    assert len(texts) > fast._MANY
    at_once, single = (fast_tokenizer(mistral).encode_flat(texts[:count]) for count in (2000, 1000))
    expected = mistral.encode_flat(texts)
    assert np.array_equal(at_once.ids, expected.ids)
    assert np.array_equal(at_once.lengths, expected.lengths)
    assert np.array_equal(single.ids, expected.ids[: len(single.ids)])


def test_encoding_takes_one_thread_and_no_package_that_is_slow_to_import() -> None:
    code = f"""
import os, sys
from megatron_instruct.tokenizer import fast_tokenizer, load_tokenizer
tokenizer = fast_tokenizer(load_tokenizer({str(mistral_v1())!r}))
tokenizer.encode_flat(["first"])
before = len(os.listdir("/proc/self/task"))
tokenizer.encode_flat(["some text " * 200] * 500)
print(before, len(os.listdir("/proc/self/task")), "awkward" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after, awkward = done.stdout.split()
    assert before == after
    assert awkward == "False"
