"""Reports for the machines of others: JUnit XML for test pages, SARIF for code scanning."""

import hashlib
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from samestep.audit.baseline import Comparison
from samestep.audit.source import portable
from samestep.utils.text import printable
from samestep.utils.version import package_version

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
FAILED_RUN = "subject-not-run"
"""The rule of a subject that could not be run at all."""

Report = dict[str, Any]


def junit(reference: str, report: Report, *, compared: Comparison | None = None) -> str:
    """A test suite in JUnit's XML: each axis is a test.

    Args:
        reference: The subject as it was named; the class of the tests.
        report: `samestep.audit.check.CheckReport.as_dict`.
        compared: With the known faults, if there is a file of them: these are skipped tests.

    Returns:
        XML.
    """
    suite = ET.Element("testsuite", name=_xml(report["subject"]))
    properties = ET.SubElement(suite, "properties")
    for name in ("dtype", "seed", "examples"):
        ET.SubElement(properties, "property", name=name, value=_xml(report[name]))
    for name, value in report["versions"].items():
        ET.SubElement(properties, "property", name=f"version {name}", value=_xml(value))
    for axis in report["axes"]:
        case = ET.SubElement(suite, "testcase", classname=_xml(reference), name=_xml(axis["name"]))
        if axis["verdict"] == "skipped":
            ET.SubElement(case, "skipped", message=_xml(axis["reason"]))
        elif axis["verdict"] == "inexact":
            if compared is not None and compared.status(axis["name"]) == "known":
                ET.SubElement(case, "skipped", message=_xml(f"known fault: {_numbers(axis)}"))
            else:
                failure = ET.SubElement(
                    case, "failure", type=_xml(axis["cause"]), message=_xml(_numbers(axis))
                )
                failure.text = _xml(_told(axis))
    return _suites(suite)


def junit_error(reference: str, error: str) -> str:
    """A test suite of a subject that could not be run: one test, with an error."""
    suite = ET.Element("testsuite", name=_xml(reference))
    case = ET.SubElement(suite, "testcase", classname=_xml(reference), name="run")
    found = ET.SubElement(case, "error", type="CheckError", message=_xml(error.split("\n")[0]))
    found.text = _xml(error)
    return _suites(suite)


def sarif(reference: str, report: Report, *, compared: Comparison | None = None) -> str:
    """A run in SARIF 2.1.0: each inexact axis is a result, each cause a rule.

    Args:
        reference: The subject as it was named.
        report: `samestep.audit.check.CheckReport.as_dict`, with ``source`` beside it.
        compared: With the known faults, if there is a file of them: these are notes, suppressed.

    Returns:
        JSON.
    """
    faults = [axis for axis in report["axes"] if axis["verdict"] == "inexact"]
    results = [_result(reference, report, axis, compared) for axis in faults]
    rules = {axis["cause"]: axis["advice"] for axis in faults}
    return _sarif(rules, results, successful=True)


def sarif_error(reference: str, error: str) -> str:
    """A run in SARIF of a subject that could not be run: one result, and a run that failed."""
    result = {
        "ruleId": FAILED_RUN,
        "level": "error",
        "message": {"text": printable(f"{reference} could not be run: {error}")},
        "locations": _locations(reference, None),
    }
    return _sarif({FAILED_RUN: "The subject could not be run."}, [result], successful=False)


def _suites(suite: ET.Element) -> str:
    """The suite with its numbers, as a file of one suite."""
    cases = list(suite.iter("testcase"))
    kinds = {"tests": len(cases)}
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        kinds[name] = sum(case.find(tag) is not None for case in cases)
    root = ET.Element("testsuites")
    for name, number in kinds.items():
        suite.set(name, str(number))
        if name != "skipped":
            root.set(name, str(number))
    root.append(suite)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _xml(value: Any) -> str:
    """Text that XML can hold: without control characters and halves of pairs."""
    return printable(str(value))


def _told(axis: Report) -> str:
    parts = [f"{axis['cause']}: {axis['advice']}", f"compared: {axis['reason']}"]
    parts += [f"evidence: {axis['evidence']}"] if axis["evidence"] else []
    return "\n".join([*parts, _numbers(axis)])


def _numbers(axis: Report) -> str:
    difference, noise = axis["relative_difference"], axis["noise_floor"]
    if difference is None or noise is None:
        return f"{axis['name']}: {axis['cause']}"
    return f"{axis['name']}: {axis['cause']}, differs by {difference:.1e}, noise {noise:.0e}"


def _result(
    reference: str, report: Report, axis: Report, compared: Comparison | None
) -> dict[str, Any]:
    status = "" if compared is None else compared.status(axis["name"])
    identity = f"{reference}\n{axis['name']}\n{axis['cause']}"
    found: dict[str, Any] = {
        "ruleId": axis["cause"],
        "level": "note" if status == "known" else "error",
        "message": {"text": printable(f"{report['subject']}, {_told(axis)}")},
        "locations": _locations(reference, report.get("source")),
        "partialFingerprints": {"samestep/v1": hashlib.sha256(identity.encode()).hexdigest()},
        "properties": {
            name: axis[name]
            for name in ("name", "ratio", "cosine", "relative_difference", "noise_floor")
        },
    }
    if status:
        found["baselineState"] = "unchanged" if status == "known" else "new"
    if status == "known":
        found["suppressions"] = [{"kind": "external", "justification": "in the baseline file"}]
    return found


def _locations(reference: str, source: Report | None) -> list[dict[str, Any]]:
    file = (source or {}).get("file") or reference.partition(":")[0]
    if not Path(file).is_file():
        return []  # a module that was never found
    path = portable(str(file), Path.cwd())
    outside = path.startswith("..")
    place: dict[str, Any] = {"uri": Path(file).resolve().as_uri() if outside else quote(path)}
    if not outside:
        place["uriBaseId"] = "%SRCROOT%"
    region = {"startLine": (source or {}).get("line") or 1}
    return [{"physicalLocation": {"artifactLocation": place, "region": region}}]


def _sarif(rules: dict[str, str], results: Iterable[Report], *, successful: bool) -> str:
    driver = {
        "name": "samestep check",
        "semanticVersion": package_version(),
        "rules": [
            {
                "id": name,
                "shortDescription": {"text": text.split(". ")[0].rstrip(".") + "."},
                "fullDescription": {"text": text},
            }
            for name, text in rules.items()
        ],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": successful}],
        "columnKind": "unicodeCodePoints",
        "results": list(results),
    }
    # What is not finite has no number in JSON.
    content = _finite({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]})
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
