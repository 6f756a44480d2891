"""The image of config/container/Dockerfile, built by buildah, and a container of it.

No engine is needed and no registry: the base stands for the official slim image of Python.  It has
the Python of these tests in /usr/local, with pip, and from this machine a shell, some programs and
the libraries of all.  Packages come from a folder of wheels that is filled by the tests' own pip,
as this machine is configured, and is mounted at /mnt; the build itself needs no network.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILE = ROOT / "config" / "container" / "Dockerfile"

PROGRAMS = (
    *("cat", "chmod", "chown", "cp", "env", "find", "grep", "id", "install", "ln", "ls", "mkdir"),
    *("mv", "rm", "sed", "setpriv", "sh", "touch", "true", "groupadd", "useradd"),
)
"""What the official image has, too, and the file or a test may use."""

ACCOUNTS = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/usr/sbin/nologin\n",
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "shadow": "root:*:1::::::\nnobody:*:1::::::\n",
    "gshadow": "root:*::\nnogroup:*::\n",
}
MERGED = ("bin", "lib", "lib64", "sbin")
"""Folders that are links into /usr, as in Debian."""

LEFT_OUT = ("site-packages", "dist-packages", "test", "idlelib", "tkinter", "turtledemo")
"""Of Python's library: what is installed beside it, and what the slim image has no use for."""


ALSO = r"pthread|dl|m|rt|util|resolv|gcc_s|stdc\+\+"
"""Libraries that the official image has, and that wheels count on."""


class Builder:
    """buildah with a storage of its own below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._base_size = 0
        (folder / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        (folder / "registries.conf").write_text("unqualified-search-registries = []\n")

    def run(self, command: str, *arguments: str | Path) -> str:
        """Run one command of buildah; returns what it printed."""
        place = ("--storage-driver", "vfs", "--root", self._folder / "storage")
        given = [*place, "--runroot", self._folder / "run"]
        given += ["--registries-conf", self._folder / "registries.conf", command]
        if command in {"bud", "commit"}:
            given += ["--signature-policy", self._folder / "policy.json"]
        done = subprocess.run(
            ["buildah", *given, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TMPDIR": str(self._folder)},
        )
        assert done.returncode == 0, f"buildah {command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def build(self) -> "Image":
        """Build the base, then the image on it."""
        self._build_base(re.findall(r"(?m)^FROM (\S+)", FILE.read_text(encoding="utf-8"))[0])
        wheels = self._folder / "wheels"
        fill_with_wheels(wheels)
        ignored = FILE.with_name("Dockerfile.dockerignore")
        self.run(
            *("bud", "--isolation", "chroot", "--pull-never", "--layers=false", "--format=docker"),
            *("--volume", f"{wheels}:/mnt:ro", "--ignorefile", ignored),
            *("--file", FILE, "--tag", "embed-token-broker", ROOT),
        )
        container = self.run("from", "--pull-never", "embed-token-broker")
        inspected = json.loads(self.run("inspect", "--type", "image", "embed-token-broker"))
        root = Path(self.run("mount", container))
        return Image(root, inspected["Docker"]["config"], self._base_size)

    def clear(self) -> None:
        """Give the disk back: pytest keeps the folders of three runs."""
        shutil.rmtree(self._folder)

    def _build_base(self, name: str) -> None:
        container = self.run("from", "scratch")
        root = Path(self.run("mount", container))
        make_root(root)
        self._base_size = size_of(root)
        path = "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        self.run("config", "--env", path, "--cmd", "python3", container)
        self.run("commit", "--rm", "--format=docker", container, name)


class Image:
    """An image that was built: its files below `root`, and its configuration."""

    def __init__(self, root: Path, config: Mapping[str, Any], base_size: int) -> None:
        self.root = root
        self.config = config
        self.size = size_of(root)
        self.base_size = base_size

    @property
    def site(self) -> Path:
        """Where its packages are."""
        (found,) = self.root.glob("opt/broker/lib/python3.*/site-packages")
        return found

    @property
    def environment(self) -> dict[str, str]:
        """The variables that it sets."""
        return dict(entry.split("=", 1) for entry in self.config["Env"])

    @contextmanager
    def container(
        self,
        command: Sequence[str],
        mounts: Mapping[Path, str],
        variables: Mapping[str, str],
        log: Path,
    ) -> "Iterator[Container]":
        """Run a command as an engine does that was told to lock it in.

        Its root is read-only, it is process 1 of its namespace, runs as the image's user without
        any capability, and can gain none.  `mounts` are files and folders of this machine, those
        in the image's volumes for writing.
        """
        steps = ["set -e", f"mount --bind {self.root} {self.root}"]
        places = [(Path("/dev/null"), "/dev/null"), (Path("/dev/urandom"), "/dev/urandom")]
        for source, target in [*places, *mounts.items()]:
            inside = self.root / target.removeprefix("/")
            if source.is_dir():
                inside.mkdir(parents=True, exist_ok=True)
            else:
                inside.parent.mkdir(parents=True, exist_ok=True)
                inside.touch()
            steps.append(f"mount --bind {source} {inside}")
            if target not in self.config["Volumes"] and not target.startswith("/dev/"):
                steps.append(f"mount -o remount,bind,ro {inside}")
        steps += [
            f"mount -t proc proc {self.root}/proc",
            f"mount -o remount,bind,ro {self.root}",
            f'exec chroot {self.root} "$@"',
        ]
        unshare = (
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child",
        )
        with (
            log.open("w", encoding="utf-8") as output,
            subprocess.Popen(
                [*unshare, "sh", "-c", "; ".join(steps), "sh", *self.locked_in(), *command],
                stdout=output,
                stderr=output,
                env={**self.environment, **variables},
            ) as process,
        ):
            try:
                yield Container(self, process, variables)
            finally:
                process.kill()

    def locked_in(self) -> tuple[str, ...]:
        """Return what to put before a command that runs as the image's user, with no power."""
        user, _, group = self.config["User"].partition(":")
        powerless = ("--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--clear-groups")
        return ("setpriv", f"--reuid={user}", f"--regid={group}", *powerless, "--")


class Container:
    """A container that runs."""

    def __init__(
        self, image: Image, process: "subprocess.Popen[bytes]", variables: Mapping[str, str]
    ) -> None:
        self.process = process
        self._image = image
        self._variables = variables

    @property
    def pid(self) -> int:
        """Its process 1, as this machine numbers it."""
        own = self.process.pid
        (child,) = Path(f"/proc/{own}/task/{own}/children").read_text(encoding="utf-8").split()
        return int(child)

    def stop(self) -> None:
        """Tell it to end, as an engine does."""
        os.kill(self.pid, signal.SIGTERM)

    def exec(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run another command in it, as its health check is run."""
        entered = ("nsenter", "--target", str(self.pid), "--mount", "--pid", "--root", "--wd")
        return subprocess.run(
            [*entered, *self._image.locked_in(), *command],
            env={**self._image.environment, **self._variables},
            capture_output=True,
            text=True,
            check=False,
        )


def size_of(root: Path) -> int:
    """Return the bytes in the files below a folder, each counted once."""
    files = {(s.st_dev, s.st_ino): s.st_size for s in (p.lstat() for p in root.rglob("*"))}
    return sum(files.values())


def fill_with_wheels(folder: Path) -> None:
    """Download what the lock file lists, by hash, and what builds the broker's own wheel."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--only-binary", ":all:", "-d", folder]
    lock = ROOT / "config" / "lock" / "runtime.txt"
    subprocess.run([*pip, "--require-hashes", "-r", lock], check=True)
    subprocess.run([*pip, "--no-deps", "setuptools>=77"], check=True)


def make_root(root: Path) -> None:
    """Make the file system of the base."""
    for name in (
        "etc/ssl/certs",
        "mnt",
        "proc",
        "dev",
        "run",
        "sys",
        "usr/local/bin",
        "usr/local/lib",
    ):
        (root / name).mkdir(parents=True)
    for name in MERGED:
        (root / "usr" / name).mkdir()
        (root / name).symlink_to(f"usr/{name}")
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    for name, text in ACCOUNTS.items():
        (root / "etc" / name).write_text(text, encoding="utf-8")
    (root / "var" / "log").mkdir(parents=True)
    (root / "etc" / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /mnt\n")
    certificates = Path("/etc/ssl/certs/ca-certificates.crt")
    if certificates.exists():
        shutil.copy(certificates, root / "etc" / "ssl" / "certs")
    needed = [_put_program(root, name) for name in PROGRAMS]
    needed += _put_python(root)
    _put_libraries(root, needed)
    _put_pip(root)


def _put_program(root: Path, name: str) -> Path:
    found = shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin")
    assert found is not None, f"{name} is not on this machine"
    shutil.copy(found, root / "usr" / "bin" / name)
    return Path(found)


def _put_python(root: Path) -> list[Path]:
    """Put the tests' Python into /usr/local; returns what needs libraries."""
    base = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    major = f"python3.{sys.version_info.minor}"
    local = root / "usr" / "local"
    shutil.copy(base, local / "bin" / major)
    for name in ("python", "python3"):
        (local / "bin" / name).symlink_to(major)
    library = Path(sysconfig.get_path("stdlib", vars={"base": sys.base_prefix}))
    ignored = shutil.ignore_patterns(*LEFT_OUT, "__pycache__", "EXTERNALLY-MANAGED", "config-3.*")
    shutil.copytree(library, local / "lib" / major, ignore=ignored)
    return [base, *(local / "lib" / major).rglob("*.so")]


def _put_pip(root: Path) -> None:
    """Put the tests' own pip where the Python in there looks, as if it had been installed."""
    asking = ["chroot", str(root), "/usr/local/bin/python", "-c"]
    asked = "import site; print(site.getsitepackages()[0])"
    packages = root / subprocess.check_output([*asking, asked], text=True).strip()[1:]
    packages.mkdir(parents=True, exist_ok=True)
    ours = Path(sysconfig.get_path("purelib"))
    for found in (ours / "pip", *ours.glob("pip-*.dist-info")):
        shutil.copytree(
            found, packages / found.name, ignore=shutil.ignore_patterns("__pycache__", "RECORD")
        )
    (info,) = packages.glob("pip-*.dist-info")
    record = [*(path for path in packages.rglob("*") if path.is_file()), info / "RECORD"]
    lines = [f"{path.relative_to(packages)},,\n" for path in record]
    (info / "RECORD").write_text("".join(lines), encoding="utf-8")


def _put_libraries(root: Path, needed: Iterable[Path]) -> None:
    """Put each shared library where those who need it look, as the loader here finds it."""
    listed = subprocess.run(
        ["ldd", *map(str, needed)], capture_output=True, text=True, check=False
    ).stdout
    listed += subprocess.run(
        ["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True
    ).stdout
    found = set(re.findall(r"(?m)^\s+(?:\S+ => )?(/\S+) \(0x", listed))
    found |= set(re.findall(rf"lib(?:{ALSO})\.so\.\d \(.*x86-64\) => (\S+)", listed))
    folders = {"/usr/local/lib"}
    for source in map(Path, found):
        ours = source.is_relative_to(Path(sys.base_prefix) / "lib") and sys.base_prefix != "/usr"
        folder = "/usr/local/lib" if ours else str(source.parent)
        folders.add(folder)
        (root / folder[1:]).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / folder[1:] / source.name)
    lines = "".join(f"{folder}\n" for folder in sorted(folders))
    (root / "etc" / "ld.so.conf").write_text(lines, encoding="utf-8")
    subprocess.run(["/sbin/ldconfig", "-r", root], check=True)
