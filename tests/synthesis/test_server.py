"""The engine that asks a server, against a real HTTP server that behaves badly on demand: nothing lost, each failure clear."""

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megatron_instruct.manifest import read_manifest
from megatron_instruct.synthesis.engines.engine import EngineSettings, Request
from megatron_instruct.synthesis.engines.server import ServerEngine

COMPLETION = "<QUE> What is entry {id}? <ANS> It is about a bug. </END>\n\n<QUE> Which bug is told of? <ANS> The bug number one. </END>"
VLLMS = {"data": [{"id": "synthesizer", "max_model_len": 8192, "owned_by": "vllm"}]}
Synthesize = Callable[..., tuple[int, str]]


class Server(ThreadingHTTPServer):
    """Answers as the completions endpoint does, except where it was told otherwise."""

    daemon_threads = True

    def __init__(self, tokenizer_folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        self.behaviour: dict[str, list[str]] = {}
        """By text id: what its next requests meet, one after the other."""
        self.models: Any = {"data": [{"id": "synthesizer", "max_model_len": 8192}]}
        self.seen: list[dict[str, Any]] = []
        self.absence, self.away_until = 0.3, 0.0
        """Seconds that it stays away once it goes, with every connection closed unanswered; and until when on the monotonic clock."""

    def handle_error(self, *_: object) -> None:
        """A client that gave up waiting is part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing is to be printed."""

    def do_GET(self) -> None:
        if time.monotonic() < self.server.away_until:
            self.close_connection = True
        elif self.path == "/v1/models":
            self._answer(200, self.server.models)
        else:
            self._answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        if time.monotonic() < self.server.away_until:
            self.close_connection = True
            return
        prompt = (
            body["prompt"] if isinstance(body["prompt"], str) else self.server.tokenizer.decode(body["prompt"], skip_special_tokens=False)
        )
        name = re.findall(r"Entry (t\d+)", prompt)[-1]
        told = self.server.behaviour.get(name, [])
        getattr(self, f"_{told.pop(0)}" if told else "_well")(name)

    def _well(self, name: str, **changes: Any) -> None:
        text = COMPLETION.replace("{id}", name)
        choice = {"text": text, "finish_reason": "stop", "index": 0, **changes}
        self._answer(200, {"choices": [choice], "usage": {"completion_tokens": 30, "prompt_tokens_details": {"cached_tokens": 5}}})

    def _busy(self, _: str) -> None:
        self._answer(429, {"message": "too many requests"}, **{"Retry-After": "0.05"})

    def _broken(self, _: str) -> None:
        self._answer(500, {"message": "internal error"}, **{"Retry-After": "0.05"})

    def _refused(self, _: str) -> None:
        self._answer(400, {"message": "this prompt is not liked"})

    def _half(self, name: str) -> None:
        self._well(name, text="<QUE> Which bug \ud83d is told of? <ANS> The bug number one. </END> \udc00")

    def _refused_in_half(self, _: str) -> None:
        self._answer(400, {"error": {"message": "bad \ud800 thing"}})

    def _garbage(self, _: str) -> None:
        self._answer(200, None, raw=b"<html>Bad gateway</html>")

    def _deep(self, _: str) -> None:
        self._answer(200, None, raw=b"[" * 200_000)

    def _foreign(self, _: str) -> None:
        self._answer(200, {"choices": []})

    def _endless(self, _: str) -> None:
        self._answer(200, {"choices": [{"text": "", "finish_reason": "stop"}], "usage": {"completion_tokens": float("inf")}})

    def _nan_pause(self, _: str) -> None:
        self._answer(503, {}, **{"Retry-After": "nan"})

    def _inf_pause(self, _: str) -> None:
        self._answer(503, {}, **{"Retry-After": "inf"})

    def _past_pause(self, _: str) -> None:
        self._answer(503, {}, **{"Retry-After": "-5"})

    def _aborted(self, name: str) -> None:
        self._well(name, finish_reason="abort")

    def _late(self, name: str) -> None:
        time.sleep(1.0)
        self._well(name)

    def _dripping(self, _: str) -> None:
        """Never leave a read waiting for long, and never come to an end."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        until = time.monotonic() + 20
        while time.monotonic() < until:
            self.wfile.write(b"1\r\n \r\n")
            time.sleep(0.05)
        self.close_connection = True

    def _gone(self, _: str) -> None:
        self.server.away_until = time.monotonic() + self.server.absence
        self.close_connection = True

    def _lost(self, _: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"choices": [{"text": "<QUE> Which')
        self.close_connection = True

    def _short(self, name: str) -> None:
        self._well(name, finish_reason="length")

    def _answer(self, status: int, value: Any, raw: bytes | None = None, **headers: str) -> None:
        content = json.dumps(value).encode() if raw is None else raw
        self.send_response(status)
        for name, header in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, header)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(synthesizer_folder: Path) -> Iterator[Server]:
    with Server(synthesizer_folder) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def engine_settings(server: Server) -> EngineSettings:
    return EngineSettings(
        model=Path("synthesizer"),
        tokenizer=Path("synthesizer"),
        max_model_len=8192,
        temperature=0.0,
        repetition_penalty=1.0,
        seed=1,
        dtype="auto",
        structured=False,
        in_flight=4,
        tensor_parallel_size=1,
        gpu_memory_utilization=None,
        max_num_seqs=None,
        kv_cache_gib=1.0,
        threads=None,
        enforce_eager=False,
        server_url=server.url,
        server_model=None,
        server_prompt="ids",
        server_key_variable="NO_KEY",
        request_timeout=60.0,
        server_patience=5.0,
        script=None,
    )


def settings(server: Server, **more: Any) -> dict[str, Any]:
    return {"engine": "server", "server_url": server.url, "in_flight": 4, "server_patience": 1, **more}


def pairs(bench: Any, output: str = "out") -> dict[str, int]:
    return {shot["id"]: len(shot["pairs"]) for example in bench.lines(f"{output}/examples.jsonl") for shot in example["shots"]}


def test_prompts_go_out_as_ids_and_completions_come_back(bench: Any, synthesize: Synthesize, server: Server) -> None:
    status, printed = synthesize(bench.corpus(6), **settings(server))
    assert status == 0, printed
    assert pairs(bench) == {f"t{n:03d}": 2 for n in range(6)}
    asked = server.seen[0]
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("synthesizer", 400, 0.0)
    assert "seed" not in asked
    bos = server.tokenizer.token_to_id("<s>")
    assert asked["prompt"][0] == bos
    assert sorted(body["prompt"].count(bos) for body in server.seen) == [1] * 3 + [2] * 3, "one BOS an example"
    assert "17% of prompt tokens cached" not in printed
    assert re.search(r"[1-9]\d?% of prompt tokens cached", printed)
    assert read_manifest(bench.folder / "out" / "manifest.json").counts["generated_tokens"] == 180


def test_a_prompt_of_many_tokens_takes_little_work_to_send(server: Server) -> None:
    engine = ServerEngine(engine_settings(server))
    entry = server.tokenizer.encode("Entry t001", add_special_tokens=False).ids

    def seconds(tokens: int) -> float:
        """Processor time of thirty requests."""
        before = time.process_time()
        for number in range(30):
            engine.submit(Request(id=str(number), prompt=tuple(entry * (tokens // len(entry))), max_new_tokens=8))
        answered = 0
        while answered < 30:
            answered += len(engine.poll())
        return time.process_time() - before

    seconds(100)
    short, long = seconds(100), seconds(8000)
    engine.close()
    assert long < short + 1.5, "openai's own way of asking takes 6 seconds for so many tokens"


def test_what_fails_is_asked_again_and_only_what_fails_for_good_is_set_aside(bench: Any, synthesize: Synthesize, server: Server) -> None:
    server.behaviour = {
        "t000": ["busy", "busy"],
        "t001": ["broken"],
        "t002": ["refused"] * 3,
        "t003": ["garbage", "garbage"],
        "t004": ["foreign"] * 3,
        "t005": ["aborted"],
        "t006": ["late"] * 3,
        "t007": ["garbage"] * 3,
    }
    status, printed = synthesize(bench.corpus(10), rounds=1, request_timeout=0.6, **settings(server))
    assert status == 0, printed
    failed = {row["id"]: row["detail"] for row in bench.lines("out/rejects.jsonl") if row["reason"] == "request failed"}
    assert {name: failed[name].partition(":")[0] for name in failed} == {
        "t002": "the server answered 400",
        "t004": "the server's answer is no completion (ValueError",
        "t006": "no answer within request_timeout=0.6 seconds",
        "t007": "the server's answer is no JSON",
    }
    assert "<html>" in failed["t007"]
    assert "this prompt is not liked" in failed["t002"]
    assert pairs(bench) == {f"t{n:03d}": 0 if f"t{n:03d}" in failed else 2 for n in range(10)}
    assert "request failed 4" in printed


def test_an_answer_that_drips_in_is_ended_by_the_timeout(bench: Any, synthesize: Synthesize, server: Server) -> None:
    server.behaviour = {"t001": ["dripping"], "t002": ["dripping"] * 2}
    started = time.monotonic()
    status, printed = synthesize(bench.corpus(4), rounds=1, retries=1, request_timeout=0.6, **settings(server))
    assert status == 0, printed
    assert time.monotonic() - started < 15
    assert pairs(bench) == {f"t{n:03d}": 0 if n == 2 else 2 for n in range(4)}
    (failed,) = (row for row in bench.lines("out/rejects.jsonl") if row["reason"] == "request failed")
    assert failed["detail"] == "no answer within request_timeout=0.6 seconds"


def test_no_answer_ends_the_thread_that_asked(bench: Any, synthesize: Synthesize, server: Server) -> None:
    server.behaviour = {"t000": ["deep"], "t001": ["endless"], "t002": ["nan_pause", "inf_pause", "past_pause"]}
    status, printed = synthesize(bench.corpus(4), rounds=1, retries=0, **settings(server))
    assert status == 0, printed
    failed = {row["id"]: row["detail"] for row in bench.lines("out/rejects.jsonl") if row["reason"] == "request failed"}
    assert failed.keys() == {"t000", "t001"}
    assert failed["t000"].startswith("the server's answer is no JSON: [[[")
    assert failed["t001"].startswith("the server's answer is no completion (OverflowError: ")
    assert "Infinity" in failed["t001"]


def test_half_a_surrogate_pair_from_a_server_can_be_written(bench: Any, synthesize: Synthesize, server: Server) -> None:
    server.behaviour = {"t000": ["refused_in_half"], "t001": ["half"]}
    status, printed = synthesize(bench.corpus(3), rounds=1, retries=0, **settings(server))
    assert status == 0, printed
    details = {row["id"]: row["detail"] for row in bench.lines("out/rejects.jsonl") if row["reason"] == "request failed"}
    assert list(details) == ["t000"]
    assert "bad \ufffd thing" in details["t000"]
    assert [row["content"] for row in bench.lines("out/rejects.jsonl") if row["reason"] == "incomplete pair"] == ["\ufffd"]
    questions = [pair["question"] for row in bench.lines("out/examples.jsonl") for shot in row["shots"] for pair in shot["pairs"]]
    assert "Which bug \ufffd is told of?" in questions


def test_a_mistake_of_ours_ends_the_run(bench: Any, synthesize: Synthesize, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(*_: object) -> int:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("megatron_instruct.synthesis.engines.server.seed_of", mistake)
    with pytest.raises(ZeroDivisionError, match="ours"):
        synthesize(bench.corpus(4), **settings(server))


def test_a_server_that_goes_away_is_waited_for(bench: Any, synthesize: Synthesize, server: Server) -> None:
    server.behaviour, server.absence = {"t002": ["gone"]}, 2.0
    status, printed = synthesize(bench.corpus(6), rounds=2, **settings(server, server_patience=30))
    assert status == 0, printed
    assert "is started again (1 of 2)" in printed
    assert pairs(bench) == {f"t{n:03d}": 2 for n in range(6)}
    asked = [re.findall(r"Entry (t\d+)", server.tokenizer.decode(body["prompt"]))[-1] for body in server.seen]
    assert len(asked) <= 6 + 4, "at most what was in work is asked twice"


def test_a_server_that_stays_away_stops_the_run_and_what_it_answered_is_kept(bench: Any, synthesize: Synthesize, server: Server) -> None:
    server.behaviour, server.absence = {"t003": ["gone"]}, math.inf
    status, printed = synthesize(bench.corpus(6), rounds=1, **settings(server, in_flight=1, server_patience=0.1))
    assert (status, "is gone" in printed) == (5, True)
    server.away_until = 0.0
    before = len(server.seen)
    assert synthesize(bench.corpus(6), rounds=1, **settings(server, in_flight=1))[0] == 0
    assert len(server.seen) - before == 3, "t000 to t002 are not asked again"


def test_connections_that_are_lost_are_no_death_of_a_server_that_answers(
    bench: Any, synthesize: Synthesize, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_instruct.synthesis.engines.server._TRIES", 2)
    server.behaviour = {f"t{n:03d}": ["lost"] for n in range(5)} | {"t005": ["lost"] * 2}
    status, printed = synthesize(bench.corpus(8), rounds=1, retries=0, **settings(server))
    assert (status, "is started again" in printed) == (0, False), printed
    assert pairs(bench) == {f"t{n:03d}": 0 if n == 5 else 2 for n in range(8)}
    (failed,) = (row for row in bench.lines("out/rejects.jsonl") if row["reason"] == "request failed")
    assert failed["detail"].startswith("the connection was lost 2 times, at last with: ")


def test_a_completion_that_vllms_server_cuts_before_the_limit_is_none(bench: Any, synthesize: Synthesize, server: Server) -> None:
    server.models, server.behaviour = VLLMS, {"t001": ["short"]}
    assert synthesize(bench.corpus(3), rounds=1, retries=0, **settings(server))[0] == 0
    (failed,) = (row for row in bench.lines("out/rejects.jsonl") if row["reason"] == "request failed")
    assert failed["id"] == "t001"
    assert "after 30 of max_new_tokens=400; its --generation-config" in failed["detail"]
    server.behaviour = {"t001": ["short"]}
    assert synthesize(bench.corpus(3), "exact", rounds=1, retries=0, max_new_tokens=30, **settings(server))[0] == 0
    assert pairs(bench, "exact")["t001"] == 2


def test_no_server_at_all_is_one_clear_message(bench: Any, synthesize: Synthesize) -> None:
    url = {"engine": "server", "server_url": "http://127.0.0.1:9/v1", "server_patience": 0.1}
    status, printed = synthesize(bench.corpus(2), **url)
    assert status == 5
    assert "cannot be reached" in printed
    assert "python -m vllm.entrypoints.openai.api_server --model MODEL" in printed


@pytest.mark.parametrize(
    ("models", "more", "message"),
    [
        ({"data": [{"id": "a"}, {"id": "b"}]}, {}, "has 2 models: a, b; choose one with --server-model"),
        ({"data": [{"id": "synthesizer"}]}, {"server_model": "synthesiser"}, "did you mean 'synthesizer'"),
        ({"data": [{"id": "a", "max_model_len": 2048}]}, {}, "above the 2048 tokens of the server's a"),
        ({"detail": "welcome"}, {}, "does not list its models"),
        ([1, 2], {}, "does not list its models"),
    ],
)
def test_a_server_that_cannot_do_it_is_refused(
    bench: Any, synthesize: Synthesize, server: Server, models: Any, more: dict[str, Any], message: str
) -> None:
    server.models = models
    status, printed = synthesize(bench.corpus(2), **settings(server, **more))
    assert (status, message in printed) == (2, True), printed
    assert server.seen == []


def test_forced_forms_are_refused_where_the_server_is_not_vllms(bench: Any, synthesize: Synthesize, server: Server) -> None:
    own = bench.folder / "own.yaml"
    layout = {"question": "<QUE>", "answer": "<ANS>", "end": "</END>"}
    form = {"kind": "markers", "language": "en", "text": "<CON> {text} </CON>", "pair": layout, "structured_output": "form"}
    own.write_text(json.dumps(form))
    status, printed = synthesize(bench.corpus(2), **settings(server, prompt_format=own))
    assert (status, "is not vLLM's" in printed) == (2, True), printed
    server.models = VLLMS
    assert synthesize(bench.corpus(2), **settings(server, prompt_format=own))[0] == 0
    assert "<QUE>" in server.seen[0]["structured_outputs"]["grammar"]


def test_prompts_can_go_out_as_text_and_draws_have_seeds_of_their_own(bench: Any, synthesize: Synthesize, server: Server) -> None:
    more = {"server_prompt": "text", "temperature": 0.7, "repetition_penalty": 1.1, "server_model": "synthesizer"}
    assert synthesize(bench.corpus(4), **settings(server, **more))[0] == 0
    first = next(body for body in server.seen if "Entry t000" in body["prompt"])
    assert first["prompt"].startswith(" <CON> Entry t000"), "servers add BOS themselves"
    assert len({body["seed"] for body in server.seen}) == 4
    assert first["repetition_penalty"] == 1.1


@pytest.mark.parametrize(
    ("models", "penalty", "more"),
    [
        ({"data": [{"id": "synthesizer"}]}, 1.0, {}),
        ({"data": [{"id": "synthesizer"}]}, 1.5, {"repetition_penalty": 1.5}),
        (VLLMS, 1.0, {"repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0}),
        (VLLMS, 1.5, {"repetition_penalty": 1.5, "top_k": -1, "min_p": 0.0}),
    ],
)
def test_what_decides_an_answer_is_sent_and_not_left_to_the_server(
    bench: Any, synthesize: Synthesize, server: Server, models: Any, penalty: float, more: dict[str, float]
) -> None:
    server.models = models
    assert synthesize(bench.corpus(1), **settings(server, temperature=0.7, repetition_penalty=penalty))[0] == 0
    sent = {name: value for name, value in server.seen[0].items() if name not in ("model", "prompt", "max_tokens", "seed")}
    assert sent == {"temperature": 0.7, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, **more}


def test_a_model_that_only_the_server_has_needs_a_tokenizer_here(bench: Any, synthesize: Synthesize, server: Server) -> None:
    status, printed = synthesize(bench.corpus(2), **settings(server, model="org/synthesizer"))
    assert (status, "tokenizer org/synthesizer: no such folder" in printed) == (3, True)
    assert synthesize(bench.corpus(2), **settings(server, model="org/synthesizer", tokenizer=bench.model))[0] == 0
    pair = bench.lines("out/examples.jsonl")[0]["shots"][0]["pairs"][0]
    assert pair["provenance"]["synthesizer"] == "synthesizer@served"


@pytest.mark.parametrize(("name", "first", "second"), [("server_model", "m1", "m2"), ("server_prompt", "ids", "text")])
def test_answers_of_two_models_or_forms_of_prompts_are_never_mixed(
    bench: Any, synthesize: Synthesize, server: Server, name: str, first: str, second: str
) -> None:
    server.models = {"data": [{"id": "m1"}, {"id": "m2"}]}
    one, other = ({"server_model": "m1", "in_flight": 1, name: value} for value in (first, second))
    corpus = bench.corpus(4)
    server.behaviour, server.absence = {"t002": ["gone"]}, math.inf
    assert synthesize(corpus, rounds=1, **settings(server, **one, server_patience=0.1))[0] == 5, "t000 and t001 are in the journal"
    server.away_until = 0.0
    server.seen.clear()
    for finished in (False, True):
        status, printed = synthesize(corpus, rounds=1, **settings(server, **other))
        assert (status, f"made with {name}={first!r}, and this run asks for {name}={second!r}" in printed) == (2, True), printed
        assert server.seen == []
        if not finished:
            assert synthesize(corpus, rounds=1, **settings(server, **one))[0] == 0
            server.seen.clear()
    synthesize(corpus, "scripted")
    assert not {"server_model", "server_prompt"} & read_manifest(bench.folder / "scripted" / "manifest.json").settings.keys()


def test_a_url_and_its_engine_belong_together(bench: Any, synthesize: Synthesize) -> None:
    for given in ({"engine": "server"}, {"server_url": "http://localhost:8000/v1"}):
        status, printed = synthesize(bench.corpus(2), **given)
        assert (status, "engine=server and server_url belong together" in printed) == (2, True)
