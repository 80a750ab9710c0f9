"""Tokenizers: exact ids, no special tokens, a fingerprint that follows what decides the ids."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.tokenizer import copy_tokenizer, load_tokenizer

TEXTS = [
    "The hacker found a bug in the kernel.",
    "A bug is a feature; a kludge is a bug that works. ünïcödé 漢字 😀",
    "Real programmers write in tabs:\n\tgoto done;",
] * 20


def write_folder(folder: Path, *, eos: str | None = "<|endoftext|>") -> Path:
    """Train a byte-level BPE tokenizer and save it as a Hugging Face folder."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    folder.mkdir(parents=True)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "bos_token": {"content": "<|im_start|>"}}))
    return folder


def write_sentencepiece(prefix: Path) -> Path:
    """Train a sentencepiece BPE model with byte fallback."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(prefix), vocab_size=340, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hf") / "tokenizer")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("spm") / "words")


def test_ids_are_those_of_the_library_without_special_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS[:3]:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
        assert reference.encode(text).ids[0] == tokenizer.bos, "the tokenizer itself would add one"
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(TEXTS[:3]) == [tokenizer.encode(text) for text in TEXTS[:3]]


@pytest.mark.parametrize("spelled", ["<|endoftext|>", "before<|im_start|>after"])
def test_special_token_text_becomes_ordinary_tokens(folder: Path, spelled: str) -> None:
    tokenizer = load_tokenizer(folder)
    for ids in (tokenizer.encode(spelled), tokenizer.encode_batch([spelled])[0]):
        assert not {tokenizer.eod, tokenizer.bos} & set(ids)
        assert tokenizer.decode(ids) == spelled


def test_special_token_text_becomes_ordinary_tokens_with_sentencepiece(model_file: Path) -> None:
    tokenizer = load_tokenizer(model_file)
    for ids in (tokenizer.encode("one </s> two <s>"), tokenizer.encode_batch(["one </s> two <s>"])[0]):
        assert not {tokenizer.eod, tokenizer.bos} & set(ids)
        assert tokenizer.decode(ids) == "one </s> two <s>"


def test_added_tokens_count_in_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    before = load_tokenizer(folder)
    model.add_tokens(["<extra>"])
    shutil.copytree(folder, tmp_path / "more")
    model.save(str(tmp_path / "more" / "tokenizer.json"))
    after = load_tokenizer(tmp_path / "more")
    assert (after.vocab_size, after.encode("<extra>")) == (before.vocab_size + 1, [before.vocab_size])
    assert after.fingerprint != before.fingerprint


def test_sentencepiece_ids_are_those_of_sentencepiece(model_file: Path) -> None:
    tokenizer = load_tokenizer(model_file)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    assert [tokenizer.encode(text) for text in TEXTS[:3]] == [reference.encode(text) for text in TEXTS[:3]]
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos) == (340, reference.eos_id(), reference.bos_id())


def mistral_v1() -> Path:
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.origin is not None, "requirements/base.txt has mistral-common"
    return Path(spec.origin).parent / "data" / "tokenizer.model.v1"


def test_mistral_v1_ids() -> None:
    tokenizer = load_tokenizer(mistral_v1())
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod) == (32000, 1, 2)
    assert tokenizer.encode("Hello, world") == [22557, 28725, 1526]
    assert 2 not in tokenizer.encode("a </s> b")


def test_mistral_v1_ids_are_those_of_sentencepiece(jargon: list[dict[str, str]]) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(mistral_v1()))
    nasty = [
        "",
        " ",
        "\n\n\t \r\n",
        "</s><s>[INST]<|endoftext|><0x0A>",
        "▁ ▁▁",
        "e\u0301ﬁ½",
        "\0\x07\ufeff\u2028",
        "漢字 한국어 😀👩‍👩‍👧𝄞",
        "=" * 5000,
    ]
    texts = [*(row["text"] for row in jargon), *nasty]
    flat = load_tokenizer(mistral_v1()).encode_flat(texts)
    expected = reference.encode(texts)
    assert flat.ids.tolist() == [number for ids in expected for number in ids]
    assert flat.lengths.tolist() == [len(ids) for ids in expected]


def test_fingerprint_follows_ids_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    same = tmp_path / "same"
    shutil.copytree(folder, same)
    rewritten = dict(reversed(content.items())) | {"padding": None, "post_processor": None}
    rewritten["model"]["merges"] = [" ".join(pair) for pair in rewritten["model"]["merges"]]
    (same / "tokenizer.json").write_text(json.dumps(rewritten, indent=1))
    assert load_tokenizer(same).fingerprint == load_tokenizer(folder).fingerprint
    assert load_tokenizer(folder, eod_token="<|im_start|>").fingerprint != load_tokenizer(folder).fingerprint


def test_eod_comes_from_generation_config_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t", eos=None)
    with pytest.raises(ConfigError, match="name no end-of-sequence token"):
        load_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    assert load_tokenizer(folder).eod == 1


@pytest.mark.parametrize("kind", ["folder", "folder without eos", "tokenizer.json", "sentencepiece"])
def test_a_copy_is_the_same_tokenizer(folder: Path, model_file: Path, tmp_path: Path, kind: str) -> None:
    source = {"folder": folder, "tokenizer.json": folder / "tokenizer.json", "sentencepiece": model_file}.get(kind)
    if source is None:
        source = write_folder(tmp_path / "t", eos=None)
        (source / "generation_config.json").write_text('{"eos_token_id": 0}')
    target = tmp_path / "copy"
    target.mkdir()
    copy_tokenizer(source, target)
    assert load_tokenizer(target).fingerprint == load_tokenizer(source).fingerprint
    assert load_tokenizer(target).encode(TEXTS[0]) == load_tokenizer(source).encode(TEXTS[0])


def test_errors_name_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InputError, match=r"neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean '<\|endoftext\|>'"):
        load_tokenizer(folder, eod_token="<|endoftxt|>")
    for name in ("tokenizer.json", "broken.model"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(InputError, match=f"{name} is not a readable"):
            load_tokenizer(tmp_path / name)


def test_loading_needs_no_torch_and_no_transformers(folder: Path) -> None:
    code = f"""
import sys
from megatron_instruct.tokenizer import load_tokenizer
load_tokenizer({str(folder)!r}).encode("text")
sys.exit(" ".join(sorted({{"torch", "transformers"}} & sys.modules.keys())) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer.tiktoken", "tekken.json"])
def test_files_that_hold_no_tokenizer_are_named_with_what_is_wrong(tmp_path: Path, name: str) -> None:
    for content, reason in ((b"", "is empty; copy or download it again"), (b"\x80\x81 no tokenizer \xff", "is not ")):
        (tmp_path / name).write_bytes(content)
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(InputError, match=f"{name} {reason}"):
                load_tokenizer(path)
