"""The judge, against a server of the OpenAI protocol over HTTP."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdft_dist.config import EvalConfig
from sdft_dist.errors import ConfigError, Fault
from sdft_dist.evaluate import load_scorer
from sdft_dist.judge import Case

CASES = [Case("2 + 2?", "four", "4"), Case("2 + 3?", "four", "5"), Case("2 + 5?", "hm", "7")]


def reply(text):
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": "strict",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
    }  # fmt: skip


@pytest.fixture
def endpoint(monkeypatch):
    """Finds "four" right where the reference is 4, does not commit itself on "hm", and fails as often as told; or
    answers what it is told to."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, self.headers["Authorization"], asked))
            if server.failures:
                self.send_response(server.failures.pop())
                self.send_header("Retry-After", "0.01")
                self.end_headers()
                return
            if server.bodies:
                self.send(*server.bodies.pop(0))
                return
            text = asked["messages"][0]["content"]
            right = "Reference answer:\n4" in text
            verdict = (
                "Hard to say." if "hm" in text else f"Not incorrect as such: {'CORRECT' if right else 'INCORRECT'}"
            )
            self.send(reply(verdict))

        def send(self, body, kind="application/json", status=200):
            raw = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.failures, server.bodies = [], [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def judge(endpoint, **fields):
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    return load_scorer(
        EvalConfig(scorer="judge", judge={"url": url, "model": "strict", "key_variable": "JUDGE_KEY"} | fields)
    )


def test_verdicts_and_what_they_cost(endpoint):
    scorer = judge(endpoint, retries=1)
    assert scorer(CASES) == [True, False, False]
    assert (scorer.calls, scorer.prompt_tokens, scorer.completion_tokens, scorer.unclear) == (4, 40, 8, 1)
    path, key, asked = endpoint.requests[0]
    assert path == "/v1/chat/completions"
    assert key == "Bearer s3cret"
    assert asked["model"] == "strict"
    assert "temperature" not in asked, "models that reason refuse any but their own"


def test_who_stops_early_is_not_kept_by_what_is_left(endpoint):
    verdicts = judge(endpoint, parallel=2).each(CASES[:2] * 50)
    assert next(verdicts) is True
    verdicts.close()
    asked = len(endpoint.requests)
    time.sleep(0.2)
    assert len(endpoint.requests) <= asked + 2 < 100


def test_who_waits_for_an_endpoint_that_hangs_is_told_and_may_end_at_once(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    monkeypatch.setattr("sdft_dist.judge.LOOK_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        before = threading.enumerate()
        verdicts = judge(SimpleNamespace(server_port=silent.getsockname()[1]), timeout_s=5, retries=0).each(CASES)
        assert [next(verdicts), next(verdicts)] == [None, None]
        verdicts.close()
        left = [thread for thread in threading.enumerate() if thread not in before]
        assert left
        assert all(thread.daemon for thread in left), "the end of the process would wait for them"


def test_a_temperature_is_sent_where_it_is_given(endpoint):
    judge(endpoint, temperature=0)(CASES[:1])
    assert endpoint.requests[0][2]["temperature"] == 0


def test_failures_are_tried_again_and_at_last_an_error(endpoint):
    endpoint.failures += [429, 500, 503]
    assert judge(endpoint, parallel=1)(CASES[:2]) == [True, False]
    assert len(endpoint.requests) == 5
    endpoint.failures += [500] * 9
    with pytest.raises(Fault, match=r"eval\.judge\.url"):
        judge(endpoint, retries=1, parallel=1)(CASES)


def test_a_cache_asks_once(endpoint, tmp_path):
    cache = str(tmp_path / "verdicts.jsonl")
    assert judge(endpoint, cache=cache)(CASES[:2]) == [True, False]
    again = judge(endpoint, cache=cache)
    assert again(CASES[:2]) == [True, False]
    assert again.calls == 0
    assert "s3cret" not in Path(cache).read_text()
    other = judge(endpoint, cache=cache, model="lenient")
    other(CASES[:1])
    assert other.calls == 1


def test_what_is_missing_is_named(endpoint, monkeypatch):
    with pytest.raises(ConfigError, match="url and model"):
        load_scorer(EvalConfig(scorer="judge"))
    with pytest.raises(ConfigError, match=r"^eval\.judge\.url: holds a name or password, .* README") as told:
        judge(endpoint, url="https://me:pw@host/v1")
    assert "pw@" not in str(told.value)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="the environment has no JUDGE_KEY"):
        judge(endpoint)


def test_braces_in_a_completion_are_text(endpoint):
    scorer = judge(endpoint, template="Asked: {prompt}; said: {completion}; reference: {answer}; {else}")
    scorer([Case("{completion}?", "it is {answer} {prompt}", "4")])
    (_, _, asked) = endpoint.requests[0]
    said = "Asked: {completion}?; said: it is {answer} {prompt}; reference: 4; {else}"
    assert asked["messages"][0]["content"] == said


def test_a_cache_goes_on_after_a_line_that_was_cut_and_asks_again_for_a_damaged_one(endpoint, tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    judge(endpoint, cache=str(cache))(CASES[:1])
    cache.write_text(cache.read_text() + '{"key": "cut')
    judge(endpoint, cache=str(cache))(CASES[1:2])
    again = judge(endpoint, cache=str(cache))
    assert again(CASES[:2]) == [True, False]
    assert again.calls == 0
    first, *rest = cache.read_text().splitlines(keepends=True)
    cache.write_text("".join(["[7]\n", first[:9] + first[12:], *rest]))
    again = judge(endpoint, cache=str(cache))
    assert again(CASES[:2]) == [True, False]
    assert again.calls == 1


def test_two_judges_may_share_a_cache(endpoint, tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    first, second = (judge(endpoint, cache=str(cache)) for _ in range(2))
    first(CASES[:1])
    second(CASES[1:2])
    assert judge(endpoint, cache=str(cache))(CASES[:2]) == [True, False]
    assert len(endpoint.requests) == 2


NOTHING = [
    (reply(""),),
    (reply(None),),
    ({"choices": None, "error": {"message": "overloaded"}},),
    ({"choices": []},),
    ("",),
    ("<html>no such page</html>", "text/html"),
]


@pytest.mark.parametrize("body", NOTHING)
def test_a_reply_without_text_is_asked_for_again_and_at_last_an_error(endpoint, tmp_path, body):
    cache = tmp_path / "verdicts.jsonl"
    endpoint.bodies += [body, body]
    assert judge(endpoint, parallel=1, cache=str(cache))(CASES[:1]) == [True]
    assert (len(endpoint.requests), len(cache.read_text().splitlines())) == (3, 1)
    endpoint.bodies += [body, body]
    with pytest.raises(Fault, match=r"^eval\.judge\.url: .*/v1: no text in the last of 2 replies"):
        judge(endpoint, parallel=1, retries=1)(CASES[:1])


def refused(code):
    return ({"error": {"message": "no", "type": "invalid_request_error", "code": code}}, "application/json", 400)


def test_a_question_that_the_endpoint_refuses_counts_as_wrong_and_other_bad_requests_end_the_run(endpoint):
    filtered = reply(None)
    filtered["choices"][0]["finish_reason"] = "content_filter"
    endpoint.bodies += [refused("content_filter"), refused("context_length_exceeded"), (filtered,)]
    scorer = judge(endpoint, parallel=1)
    assert scorer([*CASES[:1] * 3, CASES[1]]) == [False, False, False, False]
    assert (scorer.unclear, len(endpoint.requests)) == (3, 4)
    endpoint.bodies += [refused("unsupported_parameter")]
    with pytest.raises(Fault, match="Error code: 400 - no"):
        judge(endpoint)(CASES[:1])


def test_a_reply_without_a_verdict_is_not_kept(endpoint, tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    first = judge(endpoint, cache=str(cache), retries=1)
    assert first(CASES[2:]) == [False]
    assert (first.calls, first.unclear) == (2, 1)
    assert not cache.exists()
    judge(endpoint, cache=str(cache))(CASES[:1])
    (line,) = cache.read_text().splitlines()
    cache.write_text(json.dumps(json.loads(line) | {"reply": ""}) + "\n")  # as earlier versions wrote it
    again = judge(endpoint, cache=str(cache))
    assert (again(CASES[:1]), again.calls) == ([True], 1)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("NOT CORRECT", False),
        ("The answer is **not correct**.", False),
        ("It isn't CORRECT", False),
        ("It is not entirely correct.", False),
        ("Verdict: not **CORRECT**", False),
        ("NOT_CORRECT", False),
        ("It is not INCORRECT", True),
        ("It says 5, which it is not. CORRECT", True),
        ("Is it wrong? It is not\nCORRECT", True),
        ("The unit is not\nINCORRECT", False),
        ("Its first half is not correct, but as a whole: CORRECT", True),
        ("It was answered correctly: **CORRECT**", True),
        ("__INCORRECT__", False),
    ],
)
def test_a_verdict_that_is_negated(endpoint, text, right):
    endpoint.bodies.append((reply(text),))
    scorer = judge(endpoint)
    assert (scorer(CASES[:1]), scorer.unclear) == ([right], 0)


def test_the_cache_is_checked_at_the_start_and_its_folder_made(endpoint, tmp_path):
    cache = tmp_path / "runs" / "medical" / "verdicts.jsonl"
    scorer = judge(endpoint, cache=str(cache))
    assert not cache.parent.exists(), "it may be a run_dir, which must be unused"
    scorer(CASES[:1])
    assert judge(endpoint, cache=str(cache))(CASES[:1]) == [True]
    assert len(endpoint.requests) == 1
    with pytest.raises(ConfigError, match=r"^eval\.judge\.cache: .*medical: is a folder, expected a file"):
        judge(endpoint, cache=str(cache.parent))
    with pytest.raises(ConfigError, match=r"^eval\.judge\.cache: .*below: nothing can be written to .*\.jsonl: give"):
        judge(endpoint, cache=str(cache / "below"))


def test_a_cache_that_fails_later_is_told(endpoint, tmp_path):
    scorer = judge(endpoint, cache=str(tmp_path / "later" / "verdicts.jsonl"))
    (tmp_path / "later").write_text("a file now")
    with pytest.raises(Fault, match=r"^eval\.judge\.cache: .*verdicts.jsonl: cannot be written to: "):
        scorer(CASES[:1])
