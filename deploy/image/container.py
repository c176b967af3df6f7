"""Run an image's root as an orchestrator would, and use the server in it from inside.

    python deploy/image/container.py ROOT INSPECT_JSON --target cpu

`ROOT` is the unpacked image, `INSPECT_JSON` what `buildah inspect --type image` says of it. The
container has its user, environment, entry point and command from there, and on top of that what the
manifests in deploy/kubernetes ask for: a read-only root, /tmp and /cache to write, no capabilities,
no new privileges. Checks what is promised of the image and exits with the first thing that does
not hold. Needs root and runc; see deploy/verify-image.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READY_LIMIT_S = 120
# Inside, with nothing but what is in the image.
WAIT = """
import sys, time, urllib.request
for _ in range(int(sys.argv[1]) * 50):
    try:
        sys.exit(urllib.request.urlopen("http://127.0.0.1:8000/health/ready").close())
    except OSError:
        time.sleep(0.02)
sys.exit(1)
"""
CLIENT = """
import json, sys, urllib.request
body = {"prompt": "Once upon a time", "seed": 1, "max_tokens": int(sys.argv[1]), "ignore_eos": True}
request = urllib.request.Request("http://127.0.0.1:8000/generate", json.dumps(body).encode(),
                                 {"content-type": "application/json"})
for line in urllib.request.urlopen(request, timeout=60):
    print(line.decode(), end="", flush=True)
"""
# What Triton does with every launcher, without a kernel in it: Python's headers, gcc, its cache.
TRITON = """
from triton.runtime.build import compile_module_from_src
source = '''
#include <Python.h>
static PyObject *seven(PyObject *self, PyObject *none) { return PyLong_FromLong(7); }
static PyMethodDef methods[] = {{"seven", seven, METH_NOARGS, ""}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "probe", 0, -1, methods};
PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&module); }
'''
print(compile_module_from_src(source, "probe").seven())
"""


def check(held: object, what: str) -> None:
    """Say that it held, or end."""
    if not held:
        sys.exit(f"    DOES NOT HOLD: {what}")
    print(f"    ok: {what}", flush=True)


def bundle(folder: Path, root: Path, image: dict[str, Any], target: str) -> None:
    """Write the OCI configuration of a container of this image. Code is loaded from neither of the
    folders that can be written, but for what Triton compiles."""
    subprocess.run(["runc", "spec", "--bundle", str(folder)], check=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    wanted = image["OCIv1"]["config"]
    user, group = (int(x) for x in wanted["User"].split(":"))
    none: list[str] = []
    kinds = ("bounding", "effective", "permitted", "ambient")
    config["process"] |= {
        "terminal": False,
        "user": {"uid": user, "gid": group},
        "args": wanted["Entrypoint"] + wanted["Cmd"],
        "env": wanted["Env"],
        "cwd": wanted.get("WorkingDir") or "/",
        "capabilities": dict.fromkeys(kinds, none),
        "noNewPrivileges": True,
    }
    config["root"] = {"path": str(root), "readonly": True}
    config["mounts"] += [
        {
            "type": "tmpfs",
            "source": "tmpfs",
            "destination": place,
            "options": ["nosuid", "nodev", code, f"mode={mode}", f"uid={user}", f"gid={group}"],
        }
        for place, mode, code in (
            ("/tmp", "1777", "noexec"),
            ("/cache", "0750", "noexec" if target == "cpu" else "exec"),
        )
    ]
    path.write_text(json.dumps(config))


class Container:
    """A container that runs, by its name."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self.name, self.process = name, process

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as its user."""
        words = ["runc", "exec", self.name, *command]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    def kill(self, signal: str) -> None:
        """Send a signal to its first process."""
        subprocess.run(["runc", "kill", self.name, signal], check=True)


@contextmanager
def running(root: Path, image: dict[str, Any], target: str, log: Path) -> Iterator[Container]:
    """A container with its log in a file; whatever is left of it in the end is killed."""
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as output:
        bundle(Path(folder), root, image, target)
        name = f"vitrine-{os.getpid()}"
        command = ["runc", "run", "--bundle", folder, name]
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            yield Container(name, process)
        finally:
            subprocess.run(["runc", "delete", "--force", name], check=False, capture_output=True)
            process.wait(10)


def wait_ready(container: Container, log: Path) -> float:
    """Seconds from now until it is ready, asked by one process inside. Exits with the log when
    it does not become so."""
    began = time.monotonic()
    while container.process.poll() is None and time.monotonic() - began < READY_LIMIT_S:
        if container.inside("python3", "-c", WAIT, str(READY_LIMIT_S)).returncode == 0:
            return time.monotonic() - began
    sys.exit(f"the server did not become ready:\n{log.read_text()}")


def check_image(container: Container, target: str) -> None:
    """What is in it, and what may be done from inside."""
    uid = container.inside("id", "-u").stdout.strip()
    check(uid == "10001", f"runs as user 10001 (is {uid})")
    check(container.inside("touch", "/opt/x").returncode, "the root file system is read-only")
    status = container.inside("cat", "/proc/1/status").stdout
    check("CapEff:\t0000000000000000" in status, "no capabilities")
    check("NoNewPrivs:\t1" in status, "no new privileges")
    has_compiler = container.inside("sh", "-c", "command -v gcc").returncode == 0
    if target == "cpu":
        check(not has_compiler, "no compiler")
        written = container.inside("find", "/cache", "-type", "f").stdout
        check(not written, f"nothing was written to /cache {written}")
    else:
        check(has_compiler, "a C compiler, which Triton needs")
        done = container.inside("python3", "-c", TRITON)
        check(done.stdout == "7\n", f"Triton compiles and loads with it {done.stderr[-500:]}")
    sbom = json.loads(container.inside("cat", "/usr/share/vitrine/sbom.cdx.json").stdout)
    names = {component["name"] for component in sbom["components"]}
    wanted = {"torch", "fastapi", "vitrine", "libc6", "libgomp1"}
    check(wanted <= names, f"the SBOM has {', '.join(sorted(wanted))}, of {len(names)}")


def check_served(container: Container, target: str) -> None:
    """A stream, and what serves it."""
    answer = container.inside("python3", "-c", CLIENT, "24").stdout
    done = [line for line in answer.splitlines() if '"finish_reason"' in line]
    check(done and '"length"' in done[0], "a stream of 24 tokens was served inside")
    print("        Once upon a time" + json.loads(done[0].removeprefix("data: "))["text"])
    get = (
        "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/info').read().decode())"
    )
    info = json.loads(container.inside("python3", "-c", get).stdout)
    served = "by the kernels that were compiled ahead" if target == "cpu" else "(no GPU here)"
    check(info["attention_backend"] == "cpu-compiled", f"{info['attention_backend']}, {served}")


def check_stopped(container: Container) -> None:
    """SIGTERM ends it in order: what runs is finished first."""
    command = ["runc", "exec", container.name, "python3", "-c", CLIENT, "150"]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    first = next(line for line in client.stdout if "event: token" in line)
    began = time.monotonic()
    container.kill("TERM")
    rest = first + client.stdout.read()
    client.wait(60)
    check('"finish_reason":"length"' in rest, "SIGTERM: the stream that ran was finished")
    status = container.process.wait(60)
    took = time.monotonic() - began
    check(status == 0, f"SIGTERM: exit status {status} after {took:.1f} s")


def main() -> None:
    """Start, check, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--target", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    image = json.loads(arguments.image.read_text())
    health = image["Docker"]["config"]["Healthcheck"]["Test"]
    check(health[0] == "CMD", "the image has a health check")
    labels = image["OCIv1"]["config"]["Labels"]
    check(labels["org.opencontainers.image.licenses"] == "Apache-2.0", "and labels")
    log = arguments.image.with_name("server.log")
    with running(arguments.root, image, arguments.target, log) as container:
        print(f"    ready {wait_ready(container, log):.1f} s after runc run", flush=True)
        check(container.inside(*health[1:]).returncode == 0, "its health check agrees")
        check_image(container, arguments.target)
        check_served(container, arguments.target)
        check_stopped(container)


if __name__ == "__main__":
    main()
