"""What a run shows, as a user sees it: at 80 columns, without warnings, moving, Hub or no Hub."""

import io
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from command_line import samestep
from rich.console import Console
from runs import llama_folder, write_rows

from samestep.engine.step import StepReport
from samestep.train.reporter import RunConsole, fit_line
from samestep.utils.waiting import doing, waiting


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama_folder(tmp_path / "tiny")
    write_rows(tmp_path / "rows.jsonl", 20)
    (tmp_path / "run.yaml").write_text(
        "model: tiny\ndata: rows.jsonl\nout: out\nbatch_size: 8\nsteps: 2\nmicro_batch: 4\n",
        encoding="utf-8",
    )
    return tmp_path


NUMBER = r"[\d.,e+-]+"
STEP = (
    rf"step \d/2  loss {NUMBER}  eta 0:00:\d\d  {NUMBER} tokens/s  norm {NUMBER}  lr {NUMBER}"
    r"(  2 micro-batches)?"
)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("flags", [[], ["--lora-rank", "2"], ["--gradient-checkpointing", "full"]])
def test_a_run_says_these_lines_and_no_warning(folder: Path, flags: list[str]) -> None:
    done = samestep("train", "run.yaml", *flags, folder=folder, python=("-W", "error"))
    assert done.code == 0, done.err
    lines = [
        line
        for line in done.err.splitlines()
        if not re.fullmatch(r"(reading rows\.jsonl|loading the model): \d+ s.*", line)
        and not line.startswith(("lr:", "precision:", "threads:"))
    ]
    lines = [line for line in lines if not line.startswith((" ", "rows.jsonl"))]  # what was read
    assert len(lines) == 3, done.err
    assert re.fullmatch(r"the first step on this rank: 2 micro-batches", lines[0])
    assert all(re.fullmatch(STEP, line) for line in lines[1:]), lines
    assert max(map(len, lines)) <= 80
    result = done.out.splitlines()
    assert re.fullmatch(r"2 steps, \d+ tokens, \d+\.\d s", result[0])
    assert result[1:] == ["model in out/model"]


def report(**changes: object) -> StepReport:
    values: dict[str, object] = {
        "loss": 12345.6789,
        "terms": {},
        "counts": {},
        "grad_norm": 1.2345e-7,
        "seconds": 100.0,
        "tokens": 123_456_789,
        "micro_batches": 4096,
    }
    return StepReport(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("skipped", [None, "overflow in micro-batch 1, whose rows are long"])
def test_step_number_and_eta_stay_at_80_columns(terminal: bool, skipped: str | None) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=terminal, color_system=None)
    with RunConsole(total=100_000, done=99_000, console=console) as shown:
        shown.step(report(skipped=skipped), lr=1.23456e-5)
    text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", stream.getvalue())
    last = [line for line in re.split(r"[\r\n]+", text) if "99001/100000" in line][-1]
    assert "step 99001/100000" in last
    assert "eta 1 day, 3:45:00" in last or skipped
    assert len(last.rstrip()) <= 80


def test_a_long_step_shows_that_it_moves_on_a_terminal() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None)
    with RunConsole(total=10, done=0, console=console) as shown:
        shown.micro_batch("step 1", 3, 12)
    assert "micro-batch 3 of 12" in stream.getvalue()


def test_a_long_step_says_a_line_now_and_then_without_a_terminal() -> None:
    stream, now = io.StringIO(), [0.0]
    console = Console(file=stream, width=80, force_terminal=False)
    with RunConsole(total=10, done=0, console=console, clock=lambda: now[0]) as shown:
        for number in range(1, 13):
            now[0] += 3
            shown.micro_batch("step 1", number, 12)
    assert stream.getvalue().splitlines() == [
        f"step 1: micro-batch {number} of 12" for number in (4, 8, 12)
    ]


@pytest.mark.parametrize("width", [1, 10, 11, 40])
def test_a_line_keeps_what_comes_first(width: int) -> None:
    parts = ["step 1/2", "loss", "eta 0:00:01"]
    line = fit_line(parts, width)
    assert line in {"  ".join(parts[:number]) for number in (1, 2, 3)}
    assert len(line) <= max(width, len(parts[0]))


def test_short_work_says_nothing_and_long_work_how_far_it_is() -> None:
    said: list[str] = []
    with waiting("reading rows", say=said.append):
        pass
    assert said == []
    spoken = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        spoken.set()

    with waiting("reading rows", say=say, pauses=(0.01, 60.0), clock=lambda: 7.0):
        doing("12 of 100 rows")
        assert spoken.wait(30)
    assert said == ["reading rows: 0 s, 12 of 100 rows"]


class NoSuchModel(BaseHTTPRequestHandler):
    """A Hub that has nothing."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def empty_hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), NoSuchModel)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def closed_port() -> str:
    return "http://127.0.0.1:9"


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("flags", "hub", "message"),
    [
        (["--model", "metta/llama"], "empty", "model: metta/llama is no folder.*the Hub has no"),
        (["--model", "tinny"], "closed", "model: tinny is no folder here.*cannot be asked"),
        (["--data", "some/rows"], "empty", "data: some/rows is no file.*the Hub has no dataset"),
        (["--tokenizer", "a/words"], "closed", "tokenizer: a/words is no folder.*cannot be asked"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(
    folder: Path, empty_hub: str, flags: list[str], hub: str, message: str
) -> None:
    endpoint = empty_hub if hub == "empty" else closed_port()
    hub_settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hf"),
    }
    done = samestep("train", "run.yaml", *flags, folder=folder, **hub_settings)
    assert done.code == 2
    assert re.search(message, done.err), done.err
    assert len(done.err.splitlines()) == 1
    assert done.seconds < 30  # a minute of retries before
