"""A verification as JUnit XML: one test case a check, and one for each site that failed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from loracc.reports.words import CHECKS, evidence, flip

__all__ = ["failed_sites", "junit_text"]

#: Characters that XML 1.0 has no place for, written or escaped.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_BAD = ("fail", "inconclusive")


def junit_text(body: dict[str, Any]) -> str:
    """The XML of a verification's ``to_json``."""
    suite = ElementTree.Element("testsuite", {"name": "loracc"})
    for name in CHECKS:
        if name in body:
            _case(suite, name, body[name])
    for site, reason in failed_sites(body):
        case = ElementTree.SubElement(suite, "testcase", classname="loracc.verify.site", name=_xml(site))
        ElementTree.SubElement(case, "failure", message=_xml(reason), type="fail")
    counts = {"tests": "testcase", "failures": "testcase/failure", "skipped": "testcase/skipped"}
    for key, path in counts.items():
        suite.set(key, str(len(suite.findall(path))))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def failed_sites(body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(site, why) of every weight that is not what it should be."""
    for site in body.get("numbers", {}).get("weights", {}).get("sites", []):
        if site["verdict"] == "fail":
            yield str(site["name"]), str(site["reason"])


def _case(suite: ElementTree.Element, name: str, check: dict[str, Any]) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname="loracc.verify", name=name)
    if check["verdict"] in _BAD:
        failure = ElementTree.SubElement(case, "failure", message=_xml(evidence(name, check)), type=check["verdict"])
        failure.text = _xml(flip(check)) or None
    elif check["verdict"] == "skipped":
        ElementTree.SubElement(case, "skipped", message=_xml(evidence(name, check)))
    ElementTree.SubElement(case, "system-out").text = _xml(json.dumps(check, indent=2))


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
