"""What GitHub reads: workflows, forms, updates; and what a tag has to agree with."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import output_of, tool

from broker.version import VERSION

pytestmark = pytest.mark.parts

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = GITHUB / "ISSUE_TEMPLATE"
SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "vendor.dependabot": [GITHUB / "dependabot.yml"],
    "vendor.github-issue-forms": [FORMS / "bug.yml", FORMS / "question.yml"],
    "vendor.github-issue-config": [FORMS / "config.yml"],
}


def read(path: Path) -> dict[Any, Any]:
    """Read YAML; the key `on` is True there."""
    tree: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tree


def steps() -> list[dict[str, Any]]:
    """Return every step of every job of every workflow."""
    jobs = [job for path in WORKFLOWS for job in read(path)["jobs"].values()]
    return [step for job in jobs for step in job.get("steps", ())]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_each_file_passes_its_schema(schema: str) -> None:
    """Those that check-jsonschema brings."""
    command = [tool("check-jsonschema"), "--builtin-schema", schema]
    assert output_of([*command, *map(str, SCHEMAS[schema])]) == "ok -- validation done\n"


def test_every_python_that_is_promised_is_tested() -> None:
    """Classifiers, the workflow (and the next one), what tests/run looks for beside its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [name.rpartition(" :: ")[2] for name in project["classifiers"] if ":: 3." in name]
    assert project["requires-python"] == f">={named[0]}"
    job = read(WORKFLOWS[0])["jobs"]["test"]
    *tested, coming = job["strategy"]["matrix"]["python"]
    assert tested == named
    assert job["continue-on-error"] == f"${{{{ matrix.python == '{coming}' }}}}"
    (others,) = re.findall(r"for version in ([\d. ]+);", (ROOT / "tests" / "run").read_text())
    assert others.split() == named[1:]


def test_workflows_may_do_little_and_take_actions_by_version() -> None:
    """Reading, unless a job says more; no branch of somebody else's repository."""
    for path in WORKFLOWS:
        assert read(path)["permissions"] == {"contents": "read"}
        assert "pull_request_target" not in path.read_text(encoding="utf-8")
    used = {step["uses"] for step in steps() if "uses" in step}
    assert all(re.fullmatch(r"(actions|docker)/[\w-]+@v\d+", name) for name in used), used
    for step in steps():
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


def test_scripts_in_them_are_shell_and_take_no_expression() -> None:
    """`${{ }}` in a script would be code that a branch's name can write."""
    scripts = [step["run"] for step in steps() if "run" in step]
    assert len(scripts) > 5
    for script in scripts:
        assert "${{" not in script
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        for name in re.findall(r"(?:config|\.github|tests)/[\w./-]+", script):
            assert (ROOT / name).exists(), name


def test_a_release_waits_for_every_test() -> None:
    """The tag's own version first, then all of ci.yml, then what is published."""
    jobs = read(GITHUB / "workflows" / "release.yml")["jobs"]
    assert jobs["test"] == {"needs": "version", "uses": "./.github/workflows/ci.yml"}
    assert jobs["files"]["needs"] == jobs["image"]["needs"] == "test"
    assert jobs["release"]["needs"] == ["files", "image"]


def test_the_page_says_what_is_pushed_and_how() -> None:
    """Names, machines, what lies beside the image; and the version that is pushed by hand."""
    page = (ROOT / "config" / "DEPLOY.md").read_text(encoding="utf-8")
    told = page.partition("\n## The image in a registry\n")[2].partition("\n## ")[0]
    workflow = read(GITHUB / "workflows" / "release.yml")
    named, push, attest = (
        step["with"] for step in workflow["jobs"]["image"]["steps"][-3:] if "with" in step
    )
    assert workflow["env"]["IMAGE"].startswith("ghcr.io/")
    assert "ghcr.io/OWNER/NAME:X.Y.Z" in told
    patterns = ["type=semver,pattern={{version}}", "type=semver,pattern={{major}}.{{minor}}"]
    assert named["tags"].split() == patterns  # and `latest`, which the action adds to such
    assert all(name in told for name in ("`:X.Y`", "`:latest`"))
    assert f"--platform {push['platforms']} -f {push['file']} " in told
    assert (push["push"], push["sbom"], attest["push-to-registry"]) == (True, True, True)
    assert f"-t REGISTRY/embed-token-broker:{VERSION} " in told


def test_the_notes_are_the_changelog_s_section_of_the_tag() -> None:
    """And a tag that package, chart or changelog do not have is refused, each by name."""
    notes = [sys.executable, str(GITHUB / "release_notes.py")]
    text = output_of([*notes, VERSION])
    assert text.strip() in (GITHUB / "CHANGELOG.md").read_text(encoding="utf-8")
    assert len(text) > 100
    assert "## " not in text
    done = subprocess.run([*notes, "9.9.9"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert [line.split(" is ")[0] for line in done.stderr.splitlines()] == [
        "VERSION in broker/version.py",
        "version in Chart.yaml",
        "appVersion in Chart.yaml",
        ".github/CHANGELOG.md has no section 9.9.9: write what changed",
    ]
