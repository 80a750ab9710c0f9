"""Examples rendered on the way, and the roles of their tokens: exact, aligned token by token, the same however the work is divided."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from megatron_instruct.errors import InputError
from megatron_instruct.manifest import Manifest
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset
from megatron_instruct.records import ROLE_CODES
from megatron_instruct.templates.config import RenderConfig
from megatron_instruct.templates.run import run as render

Preprocess = Callable[..., dict[str, Manifest]]
Outputs = Callable[[Path], dict[str, bytes]]
CONTEXT, INSTRUCTION, RESPONSE, GLUE, END = (ROLE_CODES[role] for role in ("context", "instruction", "response", "glue", "end_of_document"))


def rendered(folder: Path, examples: Path, **settings: Any) -> list[dict[str, Any]]:
    render(RenderConfig(input=(str(examples),), output_dir=folder, **settings))
    return [json.loads(line) for line in (folder / "augmented.jsonl").read_text(encoding="utf-8").splitlines()]


def expected_role(text: str, roles: Sequence[str], start: int, end: int) -> int:
    """The rule, said over again. roles: one for each character."""
    touched = range(start, max(end, start + 1)) if start < len(text) else range(len(text) - 1, len(text))
    visible = [roles[place] for place in touched if not text[place].isspace()]
    return ROLE_CODES["response" if "response" in visible else visible[0] if visible else roles[touched[0]]]


def roles_of(prefix: Path) -> np.ndarray:
    return np.fromfile(prefix.with_name(prefix.name + ".roles"), dtype=np.uint8)


def test_roles_are_those_of_the_characters_of_each_token(
    tmp_path: Path, examples: Path, tokenizer_folder: Path, preprocess: Preprocess
) -> None:
    manifest = preprocess(examples, tmp_path / "a", tokenizer_folder, append_eod=True)["text"]
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    expected: list[int] = []
    straddling = 0
    for row in rendered(tmp_path / "render", examples):
        offsets = tokenizer.encode(row["text"], add_special_tokens=False).offsets
        roles_of_characters = [role for left, right, role in row["spans"] for _ in range(left, right)]
        expected += [expected_role(row["text"], roles_of_characters, *place) for place in offsets] + [END]
        starts = [start for start, _, _ in row["spans"]]
        straddling += sum(any(left < start < right for start in starts) for left, right in offsets)
    roles = roles_of(tmp_path / "a_text_document")
    assert roles.tolist() == expected
    assert len(roles) == len(IndexedDataset(tmp_path / "a_text_document").tokens)
    assert manifest.facts["roles"]["straddling_tokens"] == straddling > 0
    assert manifest.facts["roles"]["tokens"] == {role: expected.count(code) for role, code in ROLE_CODES.items()}
    assert "a_text_document.roles" in [output.path for output in manifest.outputs]


def test_responses_can_be_read_off_the_tokens_of_a_real_vocabulary(
    tmp_path: Path, examples: Path, mistral_v1: Path, preprocess: Preprocess
) -> None:
    import sentencepiece

    preprocess(examples, tmp_path / "a", mistral_v1, append_eod=True, language="zh")
    decoder = sentencepiece.SentencePieceProcessor(model_file=str(mistral_v1))
    dataset, roles = IndexedDataset(tmp_path / "a_text_document"), roles_of(tmp_path / "a_text_document")
    start = 0
    for number, row in enumerate(rendered(tmp_path / "render", examples, language="zh")):
        tokens = dataset.document(number)
        of_document = roles[start : start + len(tokens)]
        start += len(tokens)
        spoken = "".join(row["text"][left:right] for left, right, role in row["spans"] if role == "response")
        runs = np.flatnonzero(np.diff(np.concatenate(([0], of_document == RESPONSE, [0])).astype(np.int8))).reshape(-1, 2)
        read = "".join(decoder.decode(tokens[left:right].tolist()) for left, right in runs)
        kept = [character for character in read if not character.isspace()]
        wanted = iter(kept)
        assert all(character in wanted for character in spoken if not character.isspace()), "every character of a response, in order"
        assert len(kept) - len("".join(spoken.split())) <= 4 * len(runs), "and little else: what shares a token with one"


def test_rendering_on_the_way_gives_what_render_templates_would(
    tmp_path: Path, examples: Path, tokenizer_folder: Path, preprocess: Preprocess, outputs: Outputs, capsys: pytest.CaptureFixture[str]
) -> None:
    on_the_way = preprocess(examples, tmp_path / "one" / "a", tokenizer_folder, append_eod=True, seed=7)["text"]
    printed = capsys.readouterr().out
    rendered(tmp_path / "render", examples, seed=7)
    preprocess(tmp_path / "render" / "augmented.jsonl", tmp_path / "two" / "a", tokenizer_folder, append_eod=True)
    one, two = outputs(tmp_path / "one"), outputs(tmp_path / "two")
    for suffix in ("bin", "idx", "roles"):
        assert one[f"a_text_document.{suffix}"] == two[f"a_text_document.{suffix}"]
    kept = [json.loads(line) for line in (tmp_path / "render" / "rejects.jsonl").read_text().splitlines()]
    rejects = [json.loads(line) for line in one["a_text_document.rejects.jsonl"].splitlines()]
    assert [(row["line"], row["pair"]) for row in rejects] == [(row["line"], row["pair"]) for row in kept]
    assert {row["reason"] for row in rejects} == {"pair: answer is no option"}
    counts = on_the_way.counts
    assert (counts["documents_in"], counts["examples"], counts["pairs_set_aside"]) == (120, 120, len(kept))
    assert on_the_way.facts["rendering"]["pairs_set_aside"] == {"answer is no option": len(kept)}
    assert on_the_way.facts["rendering"]["seed"] == 7
    assert on_the_way.facts["rendering"]["bank"]["language"] == "en"
    assert on_the_way.settings["rendering"]["seed"] == 7
    assert on_the_way.rejected == {}
    assert f"{len(kept)} set aside (answer is no option {len(kept)})" in printed


@pytest.fixture
def mixed(tmp_path: Path, examples: Path, corpus: Path) -> Path:
    """Plain documents, examples, rendered documents and a broken line, one after another."""
    rows = rendered(tmp_path / "for_mixed", examples)
    plain, raw = corpus.read_text(encoding="utf-8").splitlines(), examples.read_text(encoding="utf-8").splitlines()
    lines = [
        *plain[:150],
        *raw[:60],
        *plain[150:160],
        *(json.dumps(row, ensure_ascii=False) for row in rows[60:90]),
        "{broken",
        *plain[160:200],
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_plain_documents_and_examples_and_rendered_ones_may_be_mixed(
    tmp_path: Path, mixed: Path, tokenizer_folder: Path, preprocess: Preprocess, outputs: Outputs
) -> None:
    settings = {"append_eod": True, "on_error": "reject"}
    manifest = preprocess(mixed, tmp_path / "one" / "a", tokenizer_folder, partitions=1, **settings)["text"]
    assert (manifest.counts["documents_in"], manifest.counts["documents"], manifest.rejected) == (291, 290, {"broken JSON": 1})
    assert manifest.counts["examples"] == 60
    dataset, roles = IndexedDataset(tmp_path / "one" / "a_text_document"), roles_of(tmp_path / "one" / "a_text_document")
    assert np.array_equal(roles == END, dataset.tokens == manifest.facts["tokenizer"]["eod"])
    bounds = np.cumsum(dataset.sequence_lengths)
    plain = [*range(150), *range(210, 220), *range(250, 290)]
    has_response = [bool((part == RESPONSE).any()) for part in np.split(roles, bounds[:-1])]
    assert [number for number, found in enumerate(has_response) if not found] == plain
    assert set(np.unique(roles[: bounds[149]])) == {CONTEXT, END}
    preprocess(mixed, tmp_path / "many" / "a", tokenizer_folder, partitions=9, workers=2, **settings)
    assert outputs(tmp_path / "many") == outputs(tmp_path / "one")


def test_lines_decoded_at_once_fare_as_those_read_carefully(
    tmp_path: Path, examples: Path, tokenizer_folder: Path, preprocess: Preprocess
) -> None:
    """A compressed file is read by the careful readers alone."""
    good = examples.read_text(encoding="utf-8").splitlines()[:6]
    changes = [
        ('"question"', '"questio"'),
        ('"kind": "free_form"', '"kind": "free"'),
        ('"answer": "', '"answer": "\\ud800'),
        ('"answer": "', '"answer": "\\u0000'),
        ('{"id"', '{"more": [NaN, "\\ud800"], "id"'),
        ('{"id"', '{"text": "of both kinds", "spans": [], "provenance": {}, "id"'),
    ]
    augmented = {"id": "a", "text": "ab", "spans": [[0, 1, "context"], [1, 2, "response"]], "provenance": {}}
    others = [json.dumps({"text": "plain"}), json.dumps(augmented), '{"id": "x", "shots": []}', "", good[0][:-2]]
    lines = [line for old, new in changes for line in (good[0], good[1].replace(old, new, 1), *others, *good[2:])]
    content = "\n".join(lines).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    found = {}
    for name in ("a.jsonl", "a.jsonl.gz"):
        prefix = tmp_path / name.replace(".", "_") / "a"
        manifest = preprocess(tmp_path / name, prefix, tokenizer_folder, append_eod=True, on_error="reject")["text"]
        files = [prefix.with_name(f"a_text_document.{suffix}").read_bytes() for suffix in ("bin", "idx", "roles", "rejects.jsonl")]
        found[name] = (manifest.counts, manifest.rejected, *(file.replace(b".jsonl.gz", b".jsonl") for file in files))
    assert found["a.jsonl"] == found["a.jsonl.gz"]
    assert set(found["a.jsonl"][1]) == {"no example", "lone surrogate", "broken JSON", "NUL character"}


def test_plain_documents_alone_have_no_sidecar(tmp_path: Path, corpus: Path, tokenizer_folder: Path, preprocess: Preprocess) -> None:
    manifest = preprocess(corpus, tmp_path / "out" / "a", tokenizer_folder)["text"]
    assert not list((tmp_path / "out").glob("*.roles"))
    assert "roles" not in manifest.facts
    assert "rendering" not in manifest.settings
    preprocess(corpus, tmp_path / "out" / "a", tokenizer_folder, seed=99)  # the seed decides nothing here, so this is the same work


def test_other_templates_are_other_work(tmp_path: Path, examples: Path, tokenizer_folder: Path, preprocess: Preprocess) -> None:
    preprocess(examples, tmp_path / "a", tokenizer_folder)
    with pytest.raises(Exception, match="rendering"):
        preprocess(examples, tmp_path / "a", tokenizer_folder, seed=99)
    with pytest.raises(InputError, match=r"no_bank.yaml"):
        preprocess(examples, tmp_path / "b", tokenizer_folder, bank=tmp_path / "no_bank.yaml")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": "1", "shots": []}, "no example: 'shots' must be a non-empty list"),
        ({"id": "1", "shots": [{"id": "1", "text": " ", "pairs": []}]}, "no example: 'text' is ' '"),
        ({"id": "1", "text": "abc", "spans": [[0, 2, "context"]], "provenance": {}}, "broken spans: the spans end at 2; the text has 3"),
        ({"id": "1", "text": "abc", "spans": [[0, 3, "padding"]], "provenance": {}}, r"broken spans: span 0 is \[0, 3, \"padding\"\]"),
        ({"id": "1", "text": "abc", "spans": [[1, 3, "glue"]], "provenance": {}}, r"broken spans: span 0 is .* must be \[0, end, role\]"),
        ({"id": "1", "text": "abc", "spans": {}, "provenance": {}}, "broken spans: span 0"),
    ],
)
def test_a_faulty_example_or_rendered_document_is_named(
    tmp_path: Path, tokenizer_folder: Path, preprocess: Preprocess, row: dict[str, Any], reason: str
) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "fine"}\n' + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"c.jsonl:2: {reason}"):
        preprocess(tmp_path / "c.jsonl", tmp_path / "a", tokenizer_folder)
    manifest = preprocess(tmp_path / "c.jsonl", tmp_path / "a", tokenizer_folder, on_error="reject")["text"]
    assert manifest.rejected == {reason.partition(":")[0]: 1}


def test_roles_are_not_lost_among_several_keys(tmp_path: Path, examples: Path, tokenizer_folder: Path, preprocess: Preprocess) -> None:
    with pytest.raises(InputError, match=r"examples.jsonl:1: roles need --json-keys text: an example with pairs"):
        preprocess(examples, tmp_path / "a", tokenizer_folder, json_keys=("text", "title"))


def test_a_plain_document_may_have_keys_that_only_look_like_roles(tmp_path: Path, tokenizer_folder: Path, preprocess: Preprocess) -> None:
    rows = [{"text": "one", "spans": 5}, {"text": "two", "shots": [1]}, {"text": "three", "spans": [[0, 5, "context"]]}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert preprocess(tmp_path / "c.jsonl", tmp_path / "a", tokenizer_folder)["text"].counts["documents"] == 3
    assert not (tmp_path / "a_text_document.roles").exists()


def test_an_example_without_pairs_is_a_raw_text_and_counted(tmp_path: Path, tokenizer_folder: Path, preprocess: Preprocess) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "shots": [{"id": "a", "text": "Alone.", "pairs": []}]}) + "\n")
    counts = preprocess(tmp_path / "a.jsonl", tmp_path / "out" / "a", tokenizer_folder)["text"].counts
    assert (counts["examples"], counts["pairs_rendered"], counts["pairs_set_aside"], counts["documents"]) == (1, 0, 0, 1)


@pytest.mark.parametrize("key", ["id", "provenance"])
def test_half_a_surrogate_beside_the_texts_is_a_fault_as_in_rendering(
    tmp_path: Path, tokenizer_folder: Path, preprocess: Preprocess, key: str
) -> None:
    pair = {"question": "Q?", "answer": "A.", "provenance": {"round": "\udc80" if key == "provenance" else "1"}}
    line = {"id": "\udc80" if key == "id" else "a", "shots": [{"id": "a", "text": "Some text.", "pairs": [pair]}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="lone surrogate: half of a surrogate pair, which is no text, in an id or what is known of a pair"):
        preprocess(tmp_path / "a.jsonl", tmp_path / "out" / "a", tokenizer_folder)
