"""Tokenizers of the tiktoken family: ids as mistral-common, megatron-core and tiktoken make them; special tokens never read from text."""

import base64
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import yaml
from tiktoken_ext import openai_public

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer, tiktoken_files, token_dtype

NASTY = [
    "</s> <s> [INST] <|endoftext|> <unk><SPECIAL_20>",
    "",
    " ",
    "\n\n\t  \r\n",
    "漢字 한국어 العربية",
    "👩‍👩‍👧 😀 e\u0301 \u200b",
    "\0\x07\ufeff \u2028",
    "don't DON'T 1234567 x" + "=" * 300,
    "▁ space ▁▁",
]
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


def mistral_file(name: str) -> Path:
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.origin is not None, "requirements/base.txt has mistral-common"
    return Path(spec.origin).parent / "data" / name


@pytest.fixture(scope="module")
def tekken() -> Tokenizer:
    return load_tokenizer(mistral_file("tekken_240911.json"))


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    """The first 1,500 tokens of a real vocabulary, by rank."""
    content = json.loads(mistral_file("tekken_240911.json").read_text(encoding="utf-8"))
    return [base64.b64decode(token["token_bytes"]) for token in content["vocab"][:1500]]


@pytest.fixture
def write(tmp_path: Path, tokens: list[bytes]) -> Callable[..., Path]:
    """Write a .tiktoken file and its definition."""

    def write_files(definition: dict[str, Any] | None, *, name: str = "words.tiktoken", lines: list[str] | None = None) -> Path:
        file = tmp_path / name
        rows = lines if lines is not None else [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
        file.write_text("".join(f"{row}\n" for row in rows))
        if definition is not None:
            tiktoken_files.definition_of(file).write_text(yaml.safe_dump(definition))
        return file

    return write_files


DEFINITION = {"pattern": PATTERN, "special_tokens": {"<|endoftext|>": 1500, "<|start|>": 1502}, "eod_token": "<|endoftext|>"}


def test_tekken_ids_are_those_of_mistral_common(tekken: Tokenizer, jargon: list[dict[str, str]]) -> None:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    reference = Tekkenizer.from_file(mistral_file("tekken_240911.json"))
    texts = [*NASTY, *(row["text"] for row in jargon[::4])]
    assert tekken.encode_batch(texts) == [reference.encode(text, bos=False, eos=False) for text in texts]
    assert (tekken.vocab_size, tekken.bos, tekken.eod) == (reference.n_words, reference.bos_id, reference.eos_id)


def test_a_vocabulary_beyond_65500_takes_int32(tekken: Tokenizer) -> None:
    flat = tekken.encode_flat([*NASTY, "一丁丂七"], ends=True)
    assert flat.ids.dtype == token_dtype(131072) == "<i4"
    assert flat.ids.max() > 65535
    assert flat.ids.tolist() == [number for text in [*NASTY, "一丁丂七"] for number in tekken.encode(text)]
    assert flat.ends is not None
    assert [int(end) for end in flat.ends[flat.lengths.cumsum()[flat.lengths > 0] - 1]] == [
        len(text.encode()) for text in [*NASTY, "一丁丂七"] if text
    ]


def test_special_tokens_in_text_become_ordinary_tokens(tekken: Tokenizer, write: Callable[..., Path]) -> None:
    for tokenizer, special in ((tekken, range(1000)), (load_tokenizer(write(DEFINITION)), range(1500, 1503))):
        for text in NASTY:
            ids = tokenizer.encode(text)
            assert not set(special) & set(ids)
            assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.eod]) in ("</s>", "<|endoftext|>")


def test_a_tiktoken_file_gives_the_ids_of_tiktoken(write: Callable[..., Path], tokens: list[bytes], jargon: list[dict[str, str]]) -> None:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    reference = tiktoken.Encoding("t", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=DEFINITION["special_tokens"])  # type: ignore[arg-type]
    tokenizer = load_tokenizer(write(DEFINITION))
    texts = [*NASTY, *(row["text"] for row in jargon[:100])]
    assert tokenizer.encode_batch(texts) == [reference.encode(text, disallowed_special=()) for text in texts]
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos, tokenizer.kind) == (1503, 1500, None, "TikTokenizer")
    assert tokenizer.encode_flat(texts).ids.dtype == "<u2"


def test_special_tokens_given_as_a_list_take_the_first_ids(write: Callable[..., Path]) -> None:
    plain = load_tokenizer(write(DEFINITION))
    listed = {"pattern": PATTERN, "special_tokens": ["<unk>", "<s>", "</s>"], "num_special_tokens": 10, "eod_token": "</s>"}
    tokenizer = load_tokenizer(write({**listed, "bos_token": "<s>"}))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos) == (1510, 2, 1)
    assert tokenizer.encode(NASTY[0]) == [number + 10 for number in plain.encode(NASTY[0])]
    assert tokenizer.decode([9]) == "<SPECIAL_9>"


def test_published_encodings_need_no_definition(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    facts = tiktoken_files._facts()["encodings"]
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    for name, definition in facts.items():
        published = getattr(openai_public, name)()
        assert tiktoken_files._facts()["patterns"][definition["pattern"]] == published["pat_str"]
        assert definition["special_tokens"] == published["special_tokens"]
    assert load_tokenizer(write(None, name="cl100k_base.tiktoken")).eod == 100257


def test_a_tiktoken_file_called_tokenizer_model_is_told_from_sentencepiece(write: Callable[..., Path]) -> None:
    assert load_tokenizer(write(DEFINITION, name="tokenizer.model")).encode("a b") == load_tokenizer(write(DEFINITION)).encode("a b")


def test_special_tokens_of_older_tekken_files_are_those_of_mistral_common() -> None:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    assert tiktoken_files._facts()["tekken_special_tokens"] == [str(token["token_str"]) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # importing megatron-core warns of the optional packages it lacks
def test_a_vocabulary_of_megatron_gives_the_ids_of_megatron(tmp_path: Path, jargon: list[dict[str, str]]) -> None:
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    file = tmp_path / "some.vocab.json"
    file.write_text(json.dumps(json.loads(mistral_file("tekken_240911.json").read_text(encoding="utf-8"))["vocab"]))
    texts = [row["text"] for row in jargon[:200]]
    for pattern in ("v1", "v2"):
        tiktoken_files.definition_of(file).write_text(f"pattern: {pattern}")
        reference, tokenizer = TikTokenTokenizer(str(file), pattern=pattern), load_tokenizer(file)
        assert tokenizer.encode_batch(texts) == [reference.text_to_ids(text) for text in texts]
        assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos) == (reference.vocab_size, reference.eod, reference.bos_id)


@pytest.mark.parametrize("kind", ["tiktoken", "published", "tekken", "megatron", "folder"])
def test_a_copy_is_the_same_tokenizer(kind: str, write: Callable[..., Path], tmp_path: Path) -> None:
    source = {"tekken": mistral_file("tekken_240911.json"), "published": tmp_path / "r50k_base.tiktoken"}.get(kind, tmp_path / "f")
    if kind == "published":
        write(None, name=source.name)
    elif kind == "megatron":
        source = tmp_path / "words.json"
        tokens = json.loads(mistral_file("tekken_240911.json").read_text(encoding="utf-8"))["vocab"]
        source.write_text(json.dumps(tokens[:900]))
        tiktoken_files.definition_of(source).write_text("{num_special_tokens: 100, vocab_size: 1000}")
    elif kind in ("tiktoken", "folder"):
        source.mkdir()
        file = write(DEFINITION)
        for path in (file, tiktoken_files.definition_of(file)):
            shutil.copy(path, source)
        source = source if kind == "folder" else file
    (tmp_path / "copy").mkdir()
    copy_tokenizer(source, tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == load_tokenizer(source).fingerprint


def test_the_fingerprint_follows_what_decides_the_ids(write: Callable[..., Path], tokens: list[bytes]) -> None:
    first = load_tokenizer(write(DEFINITION)).fingerprint
    swapped = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate([*tokens[:-2], tokens[-1], tokens[-2]])]
    others = [
        write(DEFINITION, name="a.tiktoken", lines=swapped),
        write({**DEFINITION, "pattern": "v1"}, name="b.tiktoken"),
        write({**DEFINITION, "special_tokens": {"<|endoftext|>": 1501}}, name="c.tiktoken"),
    ]
    assert len({first, *(load_tokenizer(file).fingerprint for file in others)}) == 4
    assert load_tokenizer(write(DEFINITION, name="d.tiktoken")).fingerprint == first


BYTES = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]


@pytest.mark.parametrize(
    ("lines", "definition", "message"),
    [
        (BYTES, None, r"does not say how text is cut.*words.tiktoken.yaml.*cl100k_base.tiktoken"),
        ([], DEFINITION, "is empty"),
        ([*BYTES, "!!! 256"], DEFINITION, r"words.tiktoken:257: '!!!' is not base64"),
        ([*BYTES, "YWI="], DEFINITION, r"words.tiktoken:257: the rank is ''; it must be a whole number"),
        (BYTES[1:], DEFINITION, "no token for the byte 0x00"),
        ([*BYTES, "YWI= 7"], DEFINITION, "two tokens have the id 7"),
        (BYTES, {**DEFINITION, "special_tokens": {"<|endoftext|>": 3}}, "two tokens have the id 3"),
        (BYTES, {**DEFINITION, "patern": "x"}, "'patern' is no field of a definition; did you mean 'pattern'"),
        (BYTES, {**DEFINITION, "pattern": None}, "pattern=None; it must be a regular expression or one of v1, v2"),
        (BYTES, {**DEFINITION, "pattern": "("}, r"tiktoken takes neither its tokens nor its pattern '\('"),
        (BYTES, {**DEFINITION, "special_tokens": ["a", "a"]}, "no name may stand twice"),
        (
            BYTES,
            {**DEFINITION, "special_tokens": ["a", "b"], "num_special_tokens": 1},
            "num_special_tokens=1 must be a number of at least 2",
        ),
    ],
)
def test_errors_name_file_value_and_remedy(
    write: Callable[..., Path], lines: list[str], definition: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_tokenizer(write(definition, lines=lines))


def test_an_unknown_end_of_document_token_is_named(write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"eod_token='<\|end\|>' is not in the vocabulary"):
        load_tokenizer(write(DEFINITION), eod_token="<|end|>")


@pytest.mark.parametrize(
    "content", ['{"config": {}, "vocab": []}', '{"config": {"pattern": 3}, "vocab": [{"rank": 0}]}', "[1, 2]", "[]", "3"]
)
def test_json_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
