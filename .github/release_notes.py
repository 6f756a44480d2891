"""Print the changelog's section of a version, if package and chart have the same version.

For release.yml; the standard library is enough.  Exit 1 with a sentence for each that differs.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def differences(version: str) -> list[str]:
    """Return what has another version than this one, a sentence each."""
    package = (ROOT / "broker" / "version.py").read_text(encoding="utf-8")
    chart = (ROOT / "config" / "helm" / "embed-token-broker" / "Chart.yaml").read_text("utf-8")
    found = {
        "VERSION in broker/version.py": re.findall(r'(?m)^VERSION = "(.*)"$', package),
        "version in Chart.yaml": re.findall(r"(?m)^version: (\S+)", chart),
        "appVersion in Chart.yaml": re.findall(r"(?m)^appVersion: (\S+)", chart),
    }
    return [
        f"{where} is {said[0] if said else 'not there'}, the tag is {version}: make them agree"
        for where, said in found.items()
        if said != [version]
    ]


def section(version: str) -> str:
    """Return what the changelog says of a version, without its heading; empty if nothing."""
    text = (ROOT / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(rf"(?ms)^## {re.escape(version)}\b[^\n]*\n(.*?)(?=^## |\Z)", text)
    return found[1].strip() if found else ""


def main() -> int:
    """Check, then print."""
    (version,) = sys.argv[1:]
    wrong = differences(version)
    notes = section(version)
    if not notes:
        wrong.append(f".github/CHANGELOG.md has no section {version}: write what changed")
    if wrong:
        print(*wrong, sep="\n", file=sys.stderr)
        return 1
    print(notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
