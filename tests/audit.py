"""Known vulnerabilities of every version that constraints.txt pins: python tests/audit.py [DUMP], or `make audit`.

DUMP: all advisories on PyPI's packages in OSV's format, a ZIP of JSON files (osv-vulnerabilities.storage.googleapis.com,
PyPI/all.zip), for a machine without network; else pip-audit asks the services.

Exit codes: 0 none is known, 1 some are, 2 the dump can't be used, 3 not all versions could be looked up.
"""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
SERVICES = ("pypi", "osv")  # the second is asked where the first answers nothing


def verdict(dependencies: list[dict[str, Any]]) -> int:
    """Say what pip-audit found, of its JSON; the exit code."""
    skipped = [entry for entry in dependencies if "skip_reason" in entry]
    found = [(entry, vulnerability) for entry in dependencies for vulnerability in entry.get("vulns", [])]
    for entry, known in found:
        fixed = f", fixed in {', '.join(known['fix_versions'])}" if known["fix_versions"] else ""
        print(f"{entry['name']} {entry['version']}: {known['id']}{fixed}")
    if len(skipped) == len(dependencies):
        first = f": {skipped[0]['name']}: {skipped[0]['skip_reason']}" if skipped else ""
        print(f"not audited: of {len(dependencies)} pinned versions none could be looked up{first}", file=sys.stderr)
    elif skipped:
        names = ", ".join(entry["name"] for entry in skipped)
        print(f"not all audited: {len(skipped)} of {len(dependencies)} could not be looked up: {names}", file=sys.stderr)
    elif not found:
        print(f"{len(dependencies)} pinned versions, no known vulnerability")
    return 1 if found else 3 if skipped or not dependencies else 0


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def offline(dump: Path) -> list[dict[str, Any]]:
    """What a dump of OSV says of the pinned versions, as pip-audit's JSON. ValueError where it holds no advisory on PyPI."""
    pins = [re.split(r"==|\s*;", line)[:2] for line in CONSTRAINTS.read_text().splitlines() if "==" in line]
    entries = [{"name": name, "version": version.strip(), "vulns": []} for name, version in pins]
    advisories = 0
    with zipfile.ZipFile(dump) as archive:
        for member in archive.namelist():
            advisory = json.loads(archive.read(member))
            for affected in [] if "withdrawn" in advisory else advisory.get("affected", []):
                package = affected.get("package", {})
                if package.get("ecosystem") != "PyPI":
                    continue
                advisories += 1
                events = [event for part in affected.get("ranges", []) for event in part["events"]]
                fixed = [event["fixed"] for event in events if "fixed" in event]
                for entry in entries:
                    if _plain(entry["name"]) == _plain(package["name"]) and entry["version"] in affected.get("versions", []):
                        entry["vulns"].append({"id": advisory["id"], "fix_versions": fixed})
    if not advisories:
        raise ValueError(f"{dump} holds no advisory on a package of PyPI")
    return entries


def main() -> int:
    """Read the dump, or ask the services in turn until one answers."""
    if sys.argv[1:]:
        try:
            return verdict(offline(Path(sys.argv[1])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    found: list[dict[str, Any]] = []
    for service in SERVICES:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip_audit", "-r", str(CONSTRAINTS), "--no-deps", "--disable-pip"),
                *("-f", "json", "-s", service, "--progress-spinner", "off", "--timeout", "15"),
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        try:
            found = json.loads(done.stdout)["dependencies"]
        except ValueError:
            print(f"{service}: {(done.stderr.strip().splitlines() or ['no answer'])[-1][:300]}", file=sys.stderr)
            continue
        if not all("skip_reason" in entry for entry in found):
            break
    return verdict(found)


if __name__ == "__main__":
    sys.exit(main())
