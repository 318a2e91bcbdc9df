"""Known vulnerabilities of every version that constraints.txt pins: python tests/audit.py, or `make audit`.

Exit codes: 0 none is known, 1 some are, 3 not all versions could be looked up, which needs the network.
"""

import json
import subprocess
import sys
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


def main() -> int:
    """Ask the services in turn until one answers."""
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
