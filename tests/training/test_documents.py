"""Attention stops at the end of a document, and the loss is weighed by roles."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.records import ROLE_CODES
from megatron_instruct.training.settings.data import DataOptions

from .conftest import ITERATIONS, ROOT, STOP, Runs, preprocess, read_metrics

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_end_of_a_document_belongs_to_it_and_nothing_is_seen_across() -> None:
    import torch

    from megatron_instruct.training.documents import document_numbers, forbidden_attention

    tokens = torch.tensor([[5, 0, 7, 8], [0, 0, 3, 0]])
    assert document_numbers(tokens, 0).tolist() == [[0, 0, 1, 1], [0, 1, 2, 2]]
    allowed = ~forbidden_attention(tokens, 0)
    assert allowed.shape == (2, 1, 4, 4)
    assert allowed[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert allowed[1, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_a_batch_becomes_one_sequence_with_the_bounds_of_its_documents() -> None:
    import torch

    from megatron_instruct.training.documents import as_one_sequence

    batch = {"tokens": torch.tensor([[5, 0, 7, 8], [1, 2, 3, 0]]), "labels": torch.arange(8).reshape(2, 4)}
    packed, bounds = as_one_sequence(batch, 0)
    assert packed["tokens"].tolist() == [[5, 0, 7, 8, 1, 2, 3, 0]]
    assert packed["labels"].tolist() == [list(range(8))]
    assert bounds.cu_seqlens_q.tolist() == bounds.cu_seqlens_kv.tolist() == [0, 2, 4, 8]
    assert bounds.max_seqlen_q == 4


def test_no_token_of_a_document_changes_with_another_document(torchrun: Callable[..., Any]) -> None:
    result = torchrun(1, Path(__file__).with_name("attention_over_documents.py"))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["changed by the document before (True)"] is False
    assert found["changed by the document before (False)"] is True
    assert found["difference from the document alone (True)"] < 1e-5
    assert found["difference from the document alone (False)"] > 1e-3


def test_each_label_weighs_what_its_role_says_and_each_sample_says_where_it_is_cut_from(tmp_path: Path) -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    from megatron_instruct.training.role_weights import RoleWeightedConfig, RoleWeightedDataset, weights_by_code
    from megatron_instruct.training.sources import Vocabulary
    from megatron_instruct.training.trace import pieces

    random = np.random.default_rng(1)
    lengths = random.integers(1, 30, 50)
    roles = random.integers(0, len(ROLE_CODES), lengths.sum()).astype(np.uint8)
    tokens = (roles.astype(np.uint16) * 1000 + np.arange(len(roles), dtype=np.uint16) % 1000).astype("<u2")  # the role can be read off
    write_dataset(tmp_path / "data", tokens, lengths)
    (tmp_path / "data.roles").write_bytes(roles.tobytes())
    write_dataset(tmp_path / "plain", tokens, lengths)
    weights = weights_by_code({"response": 1.0, "instruction": 0.25, "end_of_document": 2.0})
    prefixes = [str(tmp_path / "data"), str(tmp_path / "plain")]
    ends = lengths.cumsum()
    samples = 2 * (int(lengths.sum()) // 16)  # more than an epoch
    settings = RoleWeightedConfig(
        random_seed=1,
        sequence_length=16,
        blend=(prefixes, [0.5, 0.5]),
        split="1,0,0",
        tokenizer=Vocabulary(fingerprint="f", vocab_size=6000, eod=0),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(tmp_path / "cache"),
        role_weights=weights,
        with_roles=frozenset(prefixes[:1]),
    )
    dataset, _, _ = BlendedMegatronDatasetBuilder(RoleWeightedDataset, [samples, 0, 0], lambda: True, settings).build()
    seen = 0
    for number in range(samples):
        sample = dataset[number]
        whole = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
        cut = list(pieces(dataset, number))
        assert [token for piece in cut for token in piece.ids] == whole
        assert [tokens[ends[piece.document] - lengths[piece.document] + piece.start] for piece in cut] == [piece.ids[0] for piece in cut]
        if set(sample["loss_mask"].tolist()) == {1.0}:
            continue
        seen += 1
        assert sample["loss_mask"].tolist() == [weights[label // 1000] for label in sample["labels"].tolist()]
    assert abs(seen - samples / 2) <= 2


def write_dataset(prefix: Path, tokens: Any, lengths: Any) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    start = 0
    for length in lengths:
        builder.add_document(tokens[start : start + length], [int(length)])
        start += length
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"respones": 1.0}, "no role 'respones'; did you mean 'response'"),
        ({"padding": 1.0}, "no role 'padding'"),
        ({"response": -1.0}, "response=-1.0 must be 0 or a positive number"),
        ({"response": float("nan")}, "response=nan must be"),
        ({"response": 0.0}, "every weight is 0"),
    ],
)
def test_a_weight_that_cannot_be_is_named(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataOptions(data_path=("a",), role_weights=weights)


def test_roles_are_asked_for_where_no_data_set_has_them(data: Path, tokenizer_folder: Path) -> None:
    from megatron_instruct.tokenizer import load_tokenizer
    from megatron_instruct.training.sources import find_sources

    with pytest.raises(InputError, match=r"needs data with roles, and none of .* has a \.roles file; preprocess examples"):
        find_sources(DataOptions(data_path=(str(data),), role_weights={"response": 1.0}), load_tokenizer(tokenizer_folder))


@pytest.fixture(scope="module")
def with_roles(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The prefix of a data set rendered from real texts, each with a pair, on the way."""
    folder = tmp_path_factory.mktemp("roles")
    lines = (ROOT / "examples" / "quickstart" / "jargon.jsonl").read_text(encoding="utf-8").splitlines()[:150]
    entries = [json.loads(line) for line in lines]
    rows = [{"id": one["id"], "shots": [{"id": one["id"], "text": one["text"], "pairs": [pair_about(one)]}]} for one in entries]
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return preprocess(folder / "examples.jsonl", folder / "augmented", tokenizer_folder)


def pair_about(entry: dict[str, str]) -> dict[str, str]:
    return {"kind": "free_form", "question": f"What does the Jargon File say of {entry['title']}?", "answer": entry["text"][:100]}


def test_a_batch_without_a_token_that_counts_is_left_out_and_a_run_without_any_ends(
    flags: Callable[..., list[str]], torchrun_session: Any, with_roles: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    examples = [json.loads(line) for line in (with_roles.parent / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
    bare = [{**one, "shots": [{**shot, "pairs": []} for shot in one["shots"]]} for one in examples]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(one) + "\n" for one in bare), encoding="utf-8")
    small = ("--micro-batch-size", 1, "--global-batch-size", 2, "--role-weights", "response", 1)
    few = ("--data-path", with_roles, *small, "--eval-iters", 40)
    without_pairs = preprocess(tmp_path / "bare.jsonl", tmp_path / "bare", tokenizer_folder)
    none = flags(tmp_path / "none", "--data-path", without_pairs, *small, "--train-iters", 60)
    del none[none.index("--eval-interval") : none.index("--eval-iters") + 2]  # a validation would end it at once
    plan = [
        {"flags": flags(tmp_path / "few", *few), "of": None, "at": 0},
        {"flags": flags(tmp_path / "again", *few), "of": str(tmp_path / "few"), "at": STOP},
        {"flags": none, "of": None, "at": 0},
    ]
    (tmp_path / "runs.json").write_text(json.dumps(plan))
    result = torchrun_session(1, Path(__file__).with_name("several_runs.py"), tmp_path / "runs.json")
    assert result.returncode == 0, result.stderr[-3000:]
    *done, ended = json.loads((tmp_path / "runs.json.ends").read_text())
    assert done == ["done", "done"]
    assert ended.startswith("6 step 51: no token of its batch counts in the loss, nor in the 50 steps before it"), ended
    whole, again = (read_metrics(tmp_path / name) for name in ("few", "again"))
    events = [json.loads(line) for line in (tmp_path / "few" / "faults.jsonl").read_text().splitlines()]
    left_out = {event["iteration"] for event in events}
    assert {event["kind"] for event in events} == {"empty"}
    assert all(event["documents"] for event in events)
    assert {row[0] for row in whole.training} == set(range(1, ITERATIONS + 1)) - left_out
    assert again == whole


def test_training_weighs_the_roles_that_preprocessing_left(runs: Runs, with_roles: Path) -> None:
    data = ("--data-path", with_roles, "--train-iters", 4, "--lr-decay-iters", 20, "--micro-batch-size", 16, "--global-batch-size", 64)
    roles = ("context", "instruction", "response", "glue", "end_of_document")
    folders = runs(
        1,
        {
            "plain": data,
            "all one": (*data, "--role-weights", *(word for role in roles for word in (role, 1))),
            "responses": (*data, "--role-weights", "response", 1),
            "all but responses": (*data, "--role-weights", *(word for role in roles for word in (role, int(role != "response")))),
        },
        {},
    )
    first = {name: read_metrics(folder).training[0][1] for name, folder in folders.items()}
    assert read_metrics(folders["all one"]) == read_metrics(folders["plain"])
    assert min(first["responses"], first["all but responses"]) < first["plain"] < max(first["responses"], first["all but responses"])
    share = (first["plain"] - first["all but responses"]) / (first["responses"] - first["all but responses"])
    written = np.fromfile(f"{with_roles}.roles", dtype=np.uint8)
    assert share == pytest.approx((written == ROLE_CODES["response"]).mean(), abs=0.1)
