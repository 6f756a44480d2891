"""Every documented route against the API document, with generated inputs."""

import re
import subprocess
from pathlib import Path

import plain
import pytest
from running import broker, tool

pytestmark = pytest.mark.parts

ROOMY = {
    f"limits.{name}.{field}": size
    for name in ("fingerprint", "fingerprint_mints", "agent")
    for field, size in (("rate", 6_000_000), ("burst", 1_000_000))
}

TIGHT = {"limits.client.rate": 1, "limits.client.burst": 20}

CONFIGURATION = """
continue-on-failure = true
seed = {seed}

[generation]
codec = "{codec}"
max-examples = 25

[checks]
enabled = true
positive_data_acceptance.enabled = {acceptance}

[[operations]]
include-path = "/v1/validate"
checks.ignored_auth.enabled = false  # a wrong secret is what this route is asked about: valid false
"""


@pytest.mark.parametrize(
    ("settings", "codec", "acceptance"),
    [
        pytest.param(ROOMY, "ascii", True, id="roomy limits"),
        pytest.param(TIGHT, "ascii", True, id="tight limits"),
        pytest.param({**ROOMY, "limits.fingerprint_format": "any"}, "ascii", True, id="any format"),
        # The generator knows the Unicode classes of a pattern only roughly: what it takes for
        # printable may not be, so here every answer is checked but not that it is a 200.
        pytest.param(
            {**ROOMY, "limits.fingerprint_format": "any"}, "utf-8", False, id="all of Unicode"
        ),
    ],
)
def test_o10_every_answer_matches_the_document(
    tmp_path: Path, settings: dict[str, object], codec: str, acceptance: bool
) -> None:
    """No 5xx; status, headers and body as documented; bad input refused, good input taken."""
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(
        CONFIGURATION.format(seed=7, codec=codec, acceptance=str(acceptance).lower()),
        encoding="utf-8",
    )
    with broker(tmp_path, settings) as started:
        command = [tool("schemathesis"), "--config-file", str(configuration), "run", "--no-color"]
        if settings is not ROOMY:  # limits and formats of fingerprints are the token's affair
            command += ["--exclude-path-regex", "introspect|revoke|verify"]
        command += ["-H", f"api-secret: {started.secret}", f"{started.url}/openapi.json"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300
        )
        metrics = plain.get(f"{started.admin_url}/metrics").text
    assert done.returncode == 0, done.stdout + done.stderr
    selected = 7 if settings is ROOMY else 4
    assert f"{selected} selected / 7 total" in done.stdout
    ended = {
        outcome: float(count)
        for outcome, count in re.findall(r'broker_requests_total{outcome="(\w+)"} (\S+)', metrics)
    }
    assert ended["failed"] == ended["shed"] == 0
    expected = {"invalid", "unauthorized", "minted", "limited"} - {
        "limited" if settings is not TIGHT else ""
    }
    assert all(ended[outcome] > 0 for outcome in expected), ended
