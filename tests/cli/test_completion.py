"""Shell completion, asked of the shells themselves where they are here."""

import subprocess
from pathlib import Path

import pytest
from processes import TIMEOUT, environment, run

from broker.cli.completion import SCRIPTS, bash, places
from broker.cli.main import _parser

PROGRAMS = {
    "bash": """\
source {script}
COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}}-1))
compopt() {{ :; }}  # speaks to a running completion only
_broker
printf '%s\\n' "${{COMPREPLY[@]}}"
""",
    "zsh": """\
autoload -Uz compinit && compinit -D -u
source {script}
_describe() {{ print -rl -- "${{(@)${{(@P)4}}%%:*}}" }}
_files() {{ if [[ $1 = -/ ]]; then print -l {folder}/*(N/:t); else print -l {folder}/*(N:t); fi }}
words=({words}) CURRENT=${{#words}}
_broker
""",
    "fish": "source {script}; complete -C {line}",
}
"""Programs by which each shell tells what may follow a line."""

COMMANDS = {"serve", "init", "check", "keys", "completion", "help", "version"}


@pytest.fixture(
    params=["bash", *(pytest.param(name, marks=pytest.mark.parts) for name in ("fish", "zsh"))]
)
def shell(request: pytest.FixtureRequest) -> str:
    """Each shell for which there is a script; bash is everywhere."""
    name: str = request.param
    assert name in SCRIPTS
    return name


def offered(shell: str, folder: Path, line: str) -> set[str]:
    """Return what the shell offers at the end of a line; what does not fit is left out of it."""
    script = folder / f"broker.{shell}"
    done = run("completion", shell)
    assert (done.returncode, done.stderr) == (0, b"")
    script.write_bytes(done.stdout)
    words = " ".join(f"'{word}'" for word in line.split(" "))
    program = PROGRAMS[shell].format(script=script, words=words, line=f"'{line}'", folder=folder)
    asked = subprocess.run(
        [shell, "-c", program],
        capture_output=True,
        cwd=folder,
        env=environment(HOME=str(folder)),
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    assert asked.stderr == ""
    last = line.rpartition(" ")[2]
    found = {row.split("\t")[0] for row in asked.stdout.splitlines() if row}
    return {word for word in found if word.startswith(last)}


def test_offers_commands_flags_and_values(shell: str, tmp_path: Path) -> None:
    """At every place what can stand there, behind `help` what stands without it."""
    assert offered(shell, tmp_path, "broker ") >= COMMANDS
    assert offered(shell, tmp_path, "broker se") == {"serve"}
    assert offered(shell, tmp_path, "broker keys ") >= {"generate", "list", "rotate"}
    assert offered(shell, tmp_path, "broker keys rotate --a") == {"--after"}
    assert offered(shell, tmp_path, "broker serve --listen :1 --w") == {"--workers"}
    assert offered(shell, tmp_path, "broker config example g") == {"gateway"}
    assert offered(shell, tmp_path, "broker completion ") >= set(SCRIPTS)
    assert offered(shell, tmp_path, "broker help keys ro") == {"rotate"}
    assert offered(shell, tmp_path, "broker mint --fingerprint ") == set()


def test_offers_files_where_one_is_meant(shell: str, tmp_path: Path) -> None:
    """Also one with a blank in its name."""
    (tmp_path / "my broker.toml").touch()
    found = offered(shell, tmp_path, "broker check --config my")
    assert {name.replace("\\", "") for name in found} == {"my broker.toml"}


def test_offers_folders_alone_where_one_is_meant(shell: str, tmp_path: Path) -> None:
    """A file could not be one."""
    (tmp_path / "my file").touch()
    (tmp_path / "my folder").mkdir()
    found = offered(shell, tmp_path, "broker init --folder my")
    assert {name.replace("\\", "").rstrip("/") for name in found} == {"my folder"}


def test_the_script_of_each_shell_is_one_that_it_reads(shell: str, tmp_path: Path) -> None:
    """Without running it."""
    script = tmp_path / "script"
    script.write_bytes(run("completion", shell).stdout)
    subprocess.run([shell, "-n", str(script)], check=True, capture_output=True)


def test_the_script_knows_every_flag() -> None:
    """They come from the parser, so a new one is completed without a change here."""
    found = list(places(_parser()))
    script = bash(found)
    flags = {word.text for place in found for word in place.options}
    assert "--latency" in flags
    assert {flag for flag in flags if flag not in script} == set()
