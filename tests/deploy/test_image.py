"""The image's parts that can be tested without building it; deploy/verify-image.sh does that."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import trustme
import yaml

from deploy.image import sbom
from tests.servers import running_server

ROOT = Path(__file__).parents[2]
HEALTHCHECK = ROOT / "deploy" / "image" / "healthcheck.py"
COMPOSE = ROOT / "deploy" / "compose.yaml"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def test_the_dockerfile_passes_the_linter() -> None:
    done = run(tool("hadolint"), "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_what_the_dockerfile_copies_is_there_and_sent_to_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sent = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    text = (ROOT / "Dockerfile").read_text()
    copies = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ")]
    sources = [source for words in copies if "--from" not in words[0] for source in words]
    assert "model" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == entry or source.startswith(f"{entry}/") for entry in sent), source


def test_the_packages_installed_are_those_of_pyproject() -> None:
    done = run(sys.executable, "deploy/image/requirements.py", "grammar", "otel")
    assert done.returncode == 0, done.stderr
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["grammar"], *extras["otel"]]
    assert done.stdout.splitlines() == wanted


def test_debian_packages_of_the_sbom() -> None:
    status = (
        "Package: libstdc++6\nStatus: install ok installed\nArchitecture: amd64\n"
        "Version: 1:12.2.0-14+deb12u1\nDescription: GNU\n a second line: with a colon\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: all\nVersion: 1\n"
    )
    (found,) = sbom.debian_packages(status)
    assert found["version"] == "1:12.2.0-14+deb12u1"
    assert found["purl"] == "pkg:deb/debian/libstdc%2B%2B6@1%3A12.2.0-14%2Bdeb12u1?arch=amd64"


def test_the_health_check_tells_a_server_from_none(tmp_path: Path) -> None:
    with running_server(tmp_path, "--threads", "1") as server:
        port = server.url.rpartition(":")[2]
        done = run(sys.executable, str(HEALTHCHECK), VITRINE_PORT=port)
        assert done.returncode == 0, done.stderr
        server.stop()
        assert run(sys.executable, str(HEALTHCHECK), VITRINE_PORT=port).returncode == 1


class Answers(BaseHTTPRequestHandler):
    """One status for every GET."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


def test_the_health_check_speaks_tls_and_sees_503(tmp_path: Path) -> None:
    """The certificate is for another name than the loopback's, as it is in a container."""
    own = trustme.CA().issue_cert("vitrine.example")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.configure_cert(context)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"VITRINE_PORT": str(server.server_port), "VITRINE_TLS_CERT": "cert.pem"}
        assert run(sys.executable, str(HEALTHCHECK), **environment).returncode == 0
        Answers.status = 503
        done = run(sys.executable, str(HEALTHCHECK), **environment)
        server.shutdown()
    assert done.returncode == 1
    assert "503" in done.stderr


def test_compose_is_as_its_schema_says() -> None:
    done = run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE))
    assert done.returncode == 0, done.stdout


def test_compose_gives_a_server_time_to_drain_and_nothing_to_write_on() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for name in ("cpu", "gpu"):
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["stop_grace_period"] == "45s"  # --drain-s 30, hanging up 5
        assert services[name]["build"]["target"] in (ROOT / "Dockerfile").read_text()


def test_compose_says_the_same_as_the_files_beside_it() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    for service in compose["services"].values():
        for mount in service["volumes"]:
            source = mount.partition(":")[0]
            if source.startswith("./"):
                assert (COMPOSE.parent / source).exists(), source
    folder = COMPOSE.parent
    for name, path in (
        ("prometheus", folder / "prometheus" / "prometheus.yml"),
        ("datasource", folder / "grafana" / "provisioning" / "datasources" / "prometheus.yml"),
    ):
        ours = compose["configs"][name]["content"]
        ours = ours.replace("server:8000", "127.0.0.1:8000")
        ours = ours.replace("http://prometheus:", "http://127.0.0.1:")
        assert yaml.safe_load(ours) == yaml.safe_load(path.read_text()), name
