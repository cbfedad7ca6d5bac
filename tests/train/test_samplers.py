"""Samplers of the user's own: the server of docs/rollouts.md, out of reach, answering otherwise."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from runs import llama_folder, read_lines, run_config

from samestep.errors import ConfigError, RolloutError
from samestep.train import samplers
from samestep.train.command import read_settings
from samestep.train.setup import set_up
from samestep.train.trainer import train

PAGE = Path(__file__).parents[2] / "docs" / "rollouts.md"
FILES = dict(re.findall(r'```\w+ title="(.+?)"\n(.*?)```', PAGE.read_text("utf-8"), re.DOTALL))
GROUP, LONGEST = 3, 5


class StandIn(BaseHTTPRequestHandler):
    """Answers as vLLM's OpenAI-compatible server does, with tokens made of the seed."""

    failures: ClassVar[list[int]] = []
    asked: ClassVar[list[tuple[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        if self.failures:
            self.send_error(self.failures.pop())
            return
        answer: Any = None
        if self.path == "/v1/completions":
            ids = [20 + (body["seed"] + at) % 200 for at in range(body["max_tokens"] - 1)]
            ids.append(3 if body["seed"] % 2 else 30)
            log_p = [-1.0 - at / 10 for at in range(len(ids))]
            answer = {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": log_p}}]}
        text = json.dumps(answer).encode() if answer else b""
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samplers")
    llama_folder(path / "tiny")
    rows = [{"prompt": f"What is {at} + 1? ", "answer": at + 1} for at in range(6)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("rows.jsonl", "prompts.jsonl"):
        (path / name).write_text(text, "utf-8")
    for name, content in FILES.items():
        (path / name).write_text(content, encoding="utf-8")
    return path


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    """The address is in the file itself: a module is loaded once."""
    StandIn.failures, StandIn.asked = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as here:
        threading.Thread(target=here.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{here.server_address[1]}"
        text = FILES["vllm_sampler.py"].replace("http://127.0.0.1:8000", address)
        (folder / "vllm_sampler.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(samplers, "_wait", lambda seconds, beat: None)
        monkeypatch.chdir(folder)
        yield StandIn
        here.shutdown()


def config(folder: Path, out: str, sampler: str | None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "objective": "policy",
        "reward_funcs": (f"{folder / 'rewards.py'}:brief",),
        "sampler": sampler and str(folder / sampler),
        "num_generations": GROUP,
        "max_completion_length": LONGEST,
        "precision": "float64",
        "steps": 2,
        "batch_size": 2,
        "generation_batch": 1,
        **changes,
    }
    return run_config(folder, out=str(folder / out), **settings)


def test_the_configuration_of_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    given = yaml.safe_load(FILES["grpo.yaml"])
    tiny = {"model": "tiny", "steps": 1, "batch_size": 2, "max_completion_length": 4}
    Path("grpo.yaml").write_text(yaml.safe_dump({**given, **tiny}), "utf-8")
    train(read_settings(["grpo.yaml"]))
    (line,) = read_lines(folder / "runs/grpo/log.jsonl")
    parts = [line["terms"][f"rewards/{name}"] for name in ("correct", "brief")]
    assert line["terms"]["reward"] == pytest.approx(parts[0] + 0.1 * parts[1])


def test_the_distillation_of_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    given = yaml.safe_load(FILES["gkd.yaml"])
    tiny = {"model": "tiny", "teacher": "tiny", "steps": 1, "max_completion_length": 4}
    Path("gkd.yaml").write_text(yaml.safe_dump({**given, **tiny}), "utf-8")
    train(read_settings(["gkd.yaml"]))
    (line,) = read_lines(folder / "runs/gkd/log.jsonl")
    assert line["loss"] == pytest.approx(0, abs=1e-5)  # the student is its teacher still
    assert 0 < line["terms"]["completion_length"] <= 4


def test_a_server_is_asked_again_and_its_log_p_are_used(
    folder: Path, server: type[StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    server.failures += [503, 429]
    caplog.set_level("WARNING", "samestep")
    train(config(folder, "served-run", "vllm_sampler.py:Sampler"))
    assert len([text for text in caplog.messages if "asked again in" in text]) == 2
    asked = [body for path, body in server.asked if path == "/v1/completions"]
    assert len({body["seed"] for body in asked}) == 2 * 2 * GROUP
    paths = [path for path, _ in server.asked]
    assert paths.count("/reset_prefix_cache") == 2
    assert (folder / "served" / "model.safetensors").is_file()
    log = read_lines(folder / "served-run" / "log.jsonl")
    lines = read_lines(folder / "served-run" / "rollouts.jsonl")
    assert {line["tokens"] for line in lines} == {LONGEST}
    odd = sum(body["seed"] % 2 for body in asked) / len(asked)
    shares = [line["terms"]["truncated"] for line in log]
    assert sum(shares) / 2 == pytest.approx(1 - odd)
    # The server claims more of its tokens than the model gives them: the ratio says so.
    assert all(line["terms"]["ratio"] < 0.9 for line in log)


def test_a_server_that_stays_away_ends_the_run_saved(folder: Path, server: type[StandIn]) -> None:
    out = folder / "away"
    sampler = "vllm_sampler.py:Sampler"

    server.failures += [500] * 9
    away = r"(?s)vllm_sampler.py:Sampler could not be reached for 0 s .*HTTP Error 500"
    with pytest.raises(RolloutError, match=away) as caught:
        train(config(folder, "away", sampler, sampler_timeout=0))
    assert "The run is saved after step 0: go on with --resume" in str(caught.value)
    server.failures.clear()
    train(config(folder, "away", sampler, resume=True))
    assert len(read_lines(out / "log.jsonl")) == 2


ANSWERS: dict[str, str] = {
    "return 3": "the answer is int, not a list of 1 prompts",
    "return []": "the answer has 0 prompts, and 1 were asked for",
    "return [[[20]]]": r"rows.jsonl:\d has 1 completions, and 3 were asked for",
    "return [[[20], [], [20]]]": r"rows.jsonl:\d, completion 2 has 0 tokens; at least 1, at most 5",
    "return [[[20], [20], [20] * 6]]": "completion 3 has 6 tokens; at least 1, at most 5",
    "return [[[20], 'text', [20]]]": "completion 2 must be token ids, or {ids, log_p}",
    "return [[[20], [10**6], [20]]]": r"completion 2 has token 1000000, and there are \d+",
    "return [[[3, 20], [20], [20]]]": "completion 1 goes on after token 3, which ends it",
    "return [[{'ids': [20], 'log_p': [-1, -2]}] * 3]": "completion 1 has 2 log_p for 1 tokens",
    "return [[{'ids': [20], 'log_p': [2.0]}] * 3]": "log_p that are no log-probabilities",
    "return [[{'ids': [20], 'log_p': [-1]}, [20], [20]]]": "some completions have log_p, and",
    "raise KeyError('x')": "fails: KeyError: 'x'",
    "open('/nowhere')": "fails: FileNotFoundError",
}


@pytest.fixture(scope="module")
def maker(folder: Path) -> Any:
    return set_up(config(folder, "unused", "vllm_sampler.py:Sampler")).rollouts


@pytest.mark.parametrize("body", ANSWERS)
def test_another_answer_is_named(
    folder: Path, maker: Any, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    file = folder / f"sampler_{list(ANSWERS).index(body)}.py"
    file.write_text(f"def sample(request):\n    {body}\n", "utf-8")
    own = samplers.OutsideSampler(f"{file}:sample", timeout=0)
    monkeypatch.setattr(maker, "_sampler", own)
    with pytest.raises(RolloutError, match=ANSWERS[body]) as caught:
        maker.of_step([4], 0, beat=lambda name: None)
    assert str(caught.value).startswith("sampler: ")


def test_what_is_no_sampler_is_refused(folder: Path) -> None:
    for name, message in {
        "vllm_sampler.py:Sampl": "did you mean 'Sampler'",
        "vllm_sampler.py:URL": "URL is str, not a function",
    }.items():
        with pytest.raises(ConfigError, match=message):
            train(config(folder, "refused", name))
    with pytest.raises(ConfigError, match="bitwise: what a sampler of your own"):
        config(folder, "refused", "vllm_sampler.py:Sampler", bitwise=True, precision="float32")
    with pytest.raises(ConfigError, match="sampler_timeout: it has no effect"):
        config(folder, "refused", None, sampler_timeout=5)
