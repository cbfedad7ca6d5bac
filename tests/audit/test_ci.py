"""What `samestep check` writes for CI: JUnit XML, SARIF, and the file of known faults."""

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from samestep.audit import command
from samestep.audit.baseline import Fault, compare, read_baseline, updated, write_baseline
from samestep.audit.formats import junit, sarif
from samestep.cli import main
from samestep.errors import CheckError, ConfigError


def axis(
    name: str, verdict: str = "exact", cause: str | None = None, **more: Any
) -> dict[str, Any]:
    found = verdict == "inexact"
    return {
        "name": name, "verdict": verdict, "reason": "1 x 8 against 8 x 1",
        "ratio": 4.0 if found else 1.0, "cosine": 1.0, "relative_difference": 3.0 if found else 0.0,
        "noise_floor": 1e-16, "worst": [], "cause": cause, "residual": None, "evidence": "",
        "advice": "It is wrong. Mend it." if found else "", **more,
    }  # fmt: skip


def report(*axes: dict[str, Any]) -> dict[str, Any]:
    bad = any(one["verdict"] == "inexact" for one in axes)
    return {
        "subject": "loop", "verdict": "inexact" if bad else "exact", "axes": list(axes),
        "examples": 8, "dtype": "float64", "seed": 0, "versions": {"torch": "2.13.0"},
    }  # fmt: skip


BAD = report(
    axis("micro-batch", "inexact", "unscaled-sum"),
    axis("order"),
    axis("reported", "inexact", "metric-mean-of-means"),
    axis("ranks", "skipped", reason="no ranks here"),
)


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command on a report instead of a subject; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.py").write_text("x = 1\n\n\ndef make_trainer(): ...\n", encoding="utf-8")

    def run(found: dict[str, Any] | CheckError, *arguments: str) -> int:
        def audit(*_: Any, **__: Any) -> dict[str, Any]:
            if isinstance(found, CheckError):
                raise found
            return dict(found)

        monkeypatch.setattr(command, "audit_in_child", audit)
        return main(["check", "loop.py", *arguments])

    return run


def test_known_faults_pass_new_ones_fail_and_mended_ones_are_named(
    audited: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--baseline", "known.json")
    assert audited(BAD, *base) == 2
    assert "--update-baseline writes it" in capsys.readouterr().err
    assert audited(BAD, *base, "--update-baseline") == 0
    assert "now known in known.json: micro-batch (unscaled-sum" in capsys.readouterr().out
    assert audited(BAD, *base) == 0
    assert "known: reported (metric-mean-of-means" in capsys.readouterr().out
    mended = report(axis("micro-batch", "inexact", "unscaled-sum"), axis("reported"))
    assert audited(mended, *base) == 0
    assert "remove me: reported" in capsys.readouterr().out
    more = report(*BAD["axes"], axis("padding", "inexact", "padding-attended"))
    assert audited(more, *base, "--json", "r.json") == 1
    assert "NEW: padding (padding-attended" in capsys.readouterr().out
    assert [each["axis"] for each in json.loads(Path("r.json").read_text())["baseline"]["new"]] == [
        "padding"
    ]
    assert audited(mended, *base, "--update-baseline") == 0
    assert audited(BAD, *base) == 1, "what was taken out is new again"


def test_another_cause_is_another_fault() -> None:
    known = {"micro-batch": Fault("micro-batch", "mean-of-means", 0.1)}
    found = compare(BAD, known)
    assert [fault.cause for fault in found.new] == ["unscaled-sum", "metric-mean-of-means"]
    assert [fault.cause for fault in found.mended] == ["mean-of-means"]


def test_axes_that_were_not_run_keep_their_faults() -> None:
    known = {name: Fault(name, "world-scaled") for name in ("ranks", "packing", "order")}
    assert {fault.axis for fault in compare(BAD, known).unchecked} == {"ranks", "packing"}
    assert set(updated(BAD, known)) == {"ranks", "packing", "micro-batch", "reported"}


def test_a_baseline_serves_several_subjects_from_any_folder(
    audited: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "known.json"
    write_baseline(path, {"other.py:b": {"order": Fault("order", "rng")}})
    assert audited(BAD, "--baseline", "known.json", "--update-baseline") == 0
    assert set(read_baseline(path)) == {"other.py:b", "loop.py"}
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert main(["check", "../loop.py", "--baseline", "../known.json"]) == 0


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("{", ["no JSON"]),
        ("[]", ['"format"']),
        ('{"format": "samestep baseline 1"}', ["subjects: None"]),
        (
            '{"format": "samestep baseline 1", "subjects": {"a.py": {"order": {}, "padding": '
            '{"cause": "rng", "difference": "x"}}, "b.py": 3, "c.py": {}, "c.py": {}}}',
            ["a.py, order", "a.py, padding", "b.py: 3", "'c.py' is given twice"],
        ),
    ],
)
def test_what_is_no_baseline_is_refused_whole_and_kept(
    audited: Any, capsys: pytest.CaptureFixture[str], text: str, problems: list[str]
) -> None:
    Path("known.json").write_text(text, encoding="utf-8")
    for more in ([], ["--update-baseline"]):
        assert audited(BAD, "--baseline", "known.json", *more) == 2
        told = capsys.readouterr().err
        assert all(problem in told for problem in problems), told
    assert Path("known.json").read_text(encoding="utf-8") == text


def test_updating_needs_a_file(audited: Any) -> None:
    assert audited(BAD, "--update-baseline") == 2


def test_junit_counts_each_axis_as_a_test(audited: Any) -> None:
    assert audited(BAD, "--junit", "j.xml") == 1
    suite = ET.parse("j.xml").getroot().find("testsuite")
    assert suite is not None
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4", "failures": "2", "errors": "0", "skipped": "1",
    }  # fmt: skip
    failure = suite.find("testcase[@name='micro-batch']/failure")
    assert failure is not None
    assert failure.get("type") == "unscaled-sum"
    assert "Mend it." in str(failure.text)
    known = {one: Fault(one, BAD["axes"][at]["cause"]) for at, one in ((0, "micro-batch"),)}
    text = junit("loop.py", BAD, compared=compare(BAD, known))
    found = ET.fromstring(text).find("testsuite")
    assert found is not None
    assert (found.get("failures"), found.get("skipped")) == ("1", "2")


def test_sarif_has_a_rule_for_each_cause_and_a_place(audited: Any) -> None:
    assert audited(BAD, "--sarif", "s.json", "--baseline", "b.json", "--update-baseline") == 0
    run = json.loads(Path("s.json").read_text(encoding="utf-8"))["runs"][0]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert rules == ["unscaled-sum", "metric-mean-of-means"]
    first = run["results"][0]
    assert (first["ruleId"], first["level"], first["baselineState"]) == (
        "unscaled-sum", "note", "unchanged",
    )  # fmt: skip
    place = first["locations"][0]["physicalLocation"]["artifactLocation"]
    assert place == {"uri": "loop.py", "uriBaseId": "%SRCROOT%"}
    assert audited(BAD, "--sarif", "s.json") == 1
    run = json.loads(Path("s.json").read_text(encoding="utf-8"))["runs"][0]
    assert {result["level"] for result in run["results"]} == {"error"}


def test_what_is_not_finite_or_not_printable_is_written_all_the_same() -> None:
    odd = report(
        axis("order", "inexact", "rng", relative_difference=math.inf, ratio=math.nan,
             advice="a \x1b[2J \x00 \ud800 <&> b", evidence="]]>")
    )  # fmt: skip
    suite = ET.fromstring(junit("a <b> & \x07.py", odd))
    assert "\\x1b[2J" in str(next(suite.iter("failure")).text)
    result = json.loads(sarif("missing.py", odd))["runs"][0]["results"][0]
    assert result["properties"]["relative_difference"] == "inf"


def test_a_subject_that_cannot_be_run_is_an_error_in_both(audited: Any) -> None:
    code = audited(CheckError("boom\nat line 3"), "--junit", "j.xml", "--sarif", "s.json")
    assert code == 2
    suite = ET.parse("j.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("errors"), suite.get("failures")) == ("1", "0")
    run = json.loads(Path("s.json").read_text(encoding="utf-8"))["runs"][0]
    assert run["invocations"][0]["executionSuccessful"] is False
    assert "boom" in run["results"][0]["message"]["text"]


def test_two_reports_in_one_file_are_refused(
    audited: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audited(BAD, "--junit", "x", "--sarif", "./x") == 2
    assert "one file" in capsys.readouterr().err


def test_the_file_is_checked_before_the_subject_runs(audited: Any) -> None:
    never = CheckError("the subject was run")
    with pytest.raises(ConfigError):
        read_baseline(Path("known.json"))
    assert audited(never, "--baseline", "known.json") == 2
    assert audited(never, "--junit", "no/such/folder/j.xml") == 2
