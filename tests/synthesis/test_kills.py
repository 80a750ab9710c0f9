"""Killed at any moment and run again, synthesis ends with the same bytes and asks for no finished request again; faults lose no text.

The runs are forked from one process that has imported everything, so that many of them take little time; kill -9 is real.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from megatron_instruct.manifest import read_manifest

IN_FLIGHT = 4
SETTINGS = {"rounds": 3, "shard_size": 6, "in_flight": IN_FLIGHT}
FORKER = '''
import contextlib, json, os, random, signal, sys, time
from pathlib import Path
from megatron_instruct.synthesis.run import main

warm, *work = json.load(sys.stdin)
with contextlib.redirect_stdout(sys.stderr):
    assert main(warm) == 0  # so that no fork has to compile what the first run compiles

def begin(arguments):
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if not os.environ.get("SHOW"):
            os.dup2(null, 2)
        os._exit(main(arguments))
    return pid

def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def lines(path):
    """The whole lines of a file; a last one may be torn."""
    return path.read_text().split("\\n")[:-1] if path.is_file() else []

def finished(out):
    """Ids of the texts whose requests are finished."""
    ids = set()
    for journal in (out / "shards").glob("*.journal"):
        ids |= {json.loads(line)["id"] for line in lines(journal)}
    for shard in (out / "shards").glob("[0-9]" * 6 + "/examples.jsonl"):
        ids |= {shot["id"] for line in lines(shard) for shot in json.loads(line)["shots"]}
    return ids
'''
KILLS = (
    FORKER
    + """
arguments, out, log, seed = work
out, log, moments = Path(out), Path(log), random.Random(seed)
kills, lives = 0, []
while kills < 12:
    known, before = finished(out), len(lines(log))
    pid = begin(arguments)
    wanted = max(moments.randrange(-4, 16), 0)
    while len(lines(log)) - before < wanted and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.002)
    time.sleep(moments.uniform(0, 0.04 if wanted else 0.5))
    os.kill(pid, signal.SIGKILL)
    if status(pid) != -signal.SIGKILL:
        break
    kills += 1
    asked = lines(log)[before:]
    lives.append([len(known), len(asked), sorted(known & set(asked))])
known, before = finished(out), len(lines(log))
end = status(begin(arguments))
asked = lines(log)
print(json.dumps({"kills": kills, "lives": lives, "end": end, "asked": len(asked), "again": sorted(known & set(asked[before:]))}))
"""
)
FAULTS = (
    FORKER
    + """
outcomes = []
for arguments in work:
    ends = [status(begin(arguments))]
    while ends[-1] in (5, -signal.SIGKILL) and len(ends) < 60:
        ends.append(status(begin(arguments)))
    outcomes.append(ends)
print(json.dumps(outcomes))
"""
)


def forked(bench: Any, script: str, *work: Any) -> Any:
    bench.corpus(3, "warm.jsonl")
    (bench.folder / "warm.yaml").write_text('{"completion": "<QUE> What? <ANS> A bug. </END>"}')
    warm = bench.arguments(bench.folder / "warm.jsonl", f"warm{len(list(bench.folder.glob('warm*')))}", script=bench.folder / "warm.yaml")
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, input=json.dumps([warm, *work]), capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_kill_9_at_random_moments_asks_nothing_twice_and_ends_with_the_same_bytes(bench: Any, synthesize: Callable[..., Any]) -> None:
    """90 texts in 15 shards, 0.01 s a request: kills meet start, intake, and every part of the work."""
    corpus, log = bench.corpus(90), bench.folder / "log"
    bench.script(failures={"t004": 1, "t030": 3})
    assert synthesize(corpus, "calm", **SETTINGS)[0] == 0
    bench.script(failures={"t004": 1, "t030": 3}, seconds=0.01, log=str(log))
    arguments = bench.arguments(corpus, "killed", **SETTINGS)
    for seed in range(3):  # a run may end before it was killed often enough
        log.unlink(missing_ok=True)
        subprocess.run(["rm", "-rf", str(bench.folder / "killed")], check=True)
        told = forked(bench, KILLS, arguments, str(bench.folder / "killed"), str(log), seed)
        assert told["end"] == 0
        assert told["again"] == []
        assert [life[2] for life in told["lives"]] == [[]] * told["kills"], "what was finished was asked again"
        assert told["asked"] <= 90 + 2 + told["kills"] * (IN_FLIGHT + 2), "at most what was in work, and failures, are asked again"
        calm, killed = bench.outputs("calm"), bench.outputs("killed")
        assert killed["examples.jsonl"] == calm["examples.jsonl"]
        assert killed["rejects.jsonl"] == calm["rejects.jsonl"]
        if told["kills"] >= 10:
            break
    assert told["kills"] >= 10
    known = [life[0] for life in told["lives"]]
    assert known == sorted(known)
    assert known[-1] > 10, "kills fell into the work, not only before it"
    manifests = [read_manifest(bench.folder / output / "manifest.json") for output in ("calm", "killed")]
    assert manifests[0].counts == manifests[1].counts


def write_faults(bench: Any, seed: int, **faults: float) -> list[str]:
    """Write a script of faults, and return the command line of a run on a corpus with texts that are too long."""
    script = bench.folder / f"faults{seed}.yaml"
    memory = bench.folder / f"memory{seed}"
    content = {"completion": "<QUE> What is entry {id}? <ANS> It is about a bug. </END>", "shuffle": True}
    script.write_text(json.dumps({**content, "faults": {"seed": seed, "memory": str(memory), **faults}}))
    kinds = {"long_texts": ("split", "reject")[seed % 2], "rounds": seed % 4 + 1, "shard_size": seed % 5 * 4 + 4, "restarts": 1}
    corpus = bench.folder / "corpus.jsonl"
    return bench.arguments(corpus, f"out{seed}", script=script, max_model_len=700, max_new_tokens=100, in_flight=seed % 7 + 1, **kinds)


def check_nothing_is_lost(bench: Any, seed: int, texts: dict[str, str]) -> None:
    shots = [shot for example in bench.lines(f"out{seed}/examples.jsonl") for shot in example["shots"]]
    aside = [row for row in bench.lines(f"out{seed}/rejects.jsonl") if row["where"] == "corpus"]
    assert len({shot["id"] for shot in shots}) == len(shots), "a text is there once"
    pieces: dict[str, list[str]] = {}
    for shot in shots:
        pieces.setdefault(shot["id"].partition("#")[0], []).append(shot["text"])
    for row in aside:
        pieces.setdefault(row["id"].partition("#")[0], []).append(row["content"])
    assert {name: sorted(" ".join(found).split()) for name, found in pieces.items()} == {
        name: sorted(text.split()) for name, text in texts.items()
    }
    failed = {row["id"] for row in bench.lines(f"out{seed}/rejects.jsonl") if row["reason"] == "request failed"}
    silent = {shot["id"] for shot in shots if not shot["pairs"]}
    told_of = {row["id"] for row in bench.lines(f"out{seed}/rejects.jsonl")}
    assert failed <= silent <= told_of, "a text without pairs has its reason among the rejects"


@pytest.mark.parametrize("runs", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_no_text_is_lost_in_many_runs_with_faults(bench: Any, runs: int) -> None:
    """Engines fail requests, talk nonsense, die, and take their process with them; some texts are too long for the model."""
    texts = {f"t{n:03d}": f"Entry t{n:03d} is about a bug. " + "The bug number one is told of. " * (n * 7 % 40) for n in range(16)}
    bench.corpus([{"id": name, "text": text} for name, text in texts.items()])
    outcomes = forked(
        bench, FAULTS, *(write_faults(bench, seed, failure=0.25, garbage=0.15, death=0.04, kill=0.04) for seed in range(runs))
    )
    assert [ends[-1] for ends in outcomes] == [0] * runs
    for seed in range(runs):
        check_nothing_is_lost(bench, seed, texts)
    ends = [end for run in outcomes for end in run]
    assert ends.count(-9) > 0.3 * runs, "processes were killed"
    assert ends.count(5) > 0.02 * runs, "engines died for good"
    reasons = [row["reason"] for seed in range(runs) for row in bench.lines(f"out{seed}/rejects.jsonl")]
    assert (reasons.count("request failed") > 0, reasons.count("text too long") > 0) == (True, True)
    calm_runs = min(runs, 10)
    for seed in range(calm_runs):
        (bench.folder / f"out{seed}").rename(bench.folder / f"faulty{seed}")
    calm_outcomes = forked(bench, FAULTS, *(write_faults(bench, seed, failure=0.25, garbage=0.15) for seed in range(calm_runs)))
    assert calm_outcomes == [[0]] * calm_runs
    for seed, name in itertools.product(range(calm_runs), ("examples.jsonl", "rejects.jsonl")):
        calm, faulty = bench.outputs(f"out{seed}")[name], bench.outputs(f"faulty{seed}")[name]
        assert calm == faulty, "deaths and kills change nothing"


def test_a_torn_last_line_of_a_journal_is_asked_again(bench: Any, synthesize: Callable[..., tuple[int, str]]) -> None:
    corpus, log = bench.corpus(6), bench.folder / "log"
    assert synthesize(corpus, "calm", **SETTINGS)[0] == 0
    bench.script(dead_after=4, log=str(log))
    assert synthesize(corpus, "torn", restarts=0, **SETTINGS)[0] == 5
    (journal,) = (bench.folder / "torn" / "shards").glob("*.journal")
    content = journal.read_bytes()
    torn = json.loads(content.splitlines()[-1])["id"]
    journal.write_bytes(content[:-20])
    log.unlink()
    assert synthesize(corpus, "torn", restarts=0, **SETTINGS)[0] == 0
    assert (len(log.read_text().split()), torn in log.read_text().split()) == (3, True)
    assert bench.outputs("torn")["examples.jsonl"] == bench.outputs("calm")["examples.jsonl"]


@pytest.mark.parametrize("share", [None, "0/2"])
def test_a_second_run_beside_the_first_is_refused(bench: Any, synthesize: Callable[..., tuple[int, str]], share: str | None) -> None:
    from megatron_instruct.shares import at_work, parse_share

    with at_work(bench.folder / "out", parse_share(share), bool):
        status, printed = synthesize(bench.corpus(2), **({} if share is None else {"share": share}))
    assert (status, ("another run is writing" if share is None else "is at work already") in printed) == (2, True)
