"""What is shipped: the wheel, built and installed on its own, serves."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import Broker

pytestmark = pytest.mark.parts

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_has_every_file_that_serving_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages, scripts for the store, and pages are in it: two workers start and mint.

    It is installed into a folder of its own, which comes first where Python looks.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z", "broker", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in files.rstrip("\0").split("\0"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    shipped = {str(path.relative_to(site)) for path in (site / "broker").rglob("*.*")}
    ours = {name for name in files.split("\0") if name.startswith("broker/")}
    assert {name for name in ours if not name.endswith(".md")} <= shipped
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.chdir(tmp_path)
    where = subprocess.run(
        [sys.executable, "-c", "import broker; print(broker.__file__)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert where.startswith(str(site))
    with Broker("--dev", "--listen", "127.0.0.1:0", logs=tmp_path) as broker:
        assert broker.started["url"]
