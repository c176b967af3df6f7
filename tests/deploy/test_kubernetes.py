"""The manifests: built by kustomize, valid by the API's schemas, and true of the server."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import kubernetes_validate
import pytest
import yaml

from service.commands.http_server import LAST_BYTES_S
from service.settings import Settings
from tests.servers import running_server

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("cpu", "gpu")
# The oldest with the `sleep` of preStop hooks, and the newest.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
OWN_LABEL = {"app.kubernetes.io/name": "vitrine"}

Manifest = dict[str, Any]


@cache
def build(folder: Path) -> dict[str, Manifest]:
    """What would be applied, by kind."""
    if shutil.which("kustomize"):
        command = ["kustomize", "build", str(folder)]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(folder)]
    else:
        pytest.skip("neither kustomize nor kubectl is installed: the manifests are NOT tested")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout)}


def overlay(name: str) -> dict[str, Manifest]:
    return build(FOLDER / "overlays" / name)


def with_components(name: str, folder: Path, *components: str) -> dict[str, Manifest]:
    """An overlay with more components on it, as a user's own kustomization would have it."""
    here = Path(os.path.relpath(FOLDER, folder.resolve()))
    kustomization = {
        "resources": [str(here / "overlays" / name)],
        "components": [str(here / "components" / component) for component in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return build(folder)


def pod(manifests: dict[str, Manifest]) -> Manifest:
    spec: Manifest = manifests["Deployment"]["spec"]["template"]["spec"]
    return spec


def container(manifests: dict[str, Manifest]) -> Manifest:
    (only,) = pod(manifests)["containers"]
    found: Manifest = only
    return found


def validate_custom(manifest: Manifest) -> None:
    """Against models generated from the operators' definitions. They let unknown fields pass
    and lose them, so what comes back must be what went in."""
    from cloudcoil.models.keda import v1alpha1 as keda
    from cloudcoil.models.prometheus_operator import v1 as operator

    models = {"ScaledObject": keda.ScaledObject, "PodMonitor": operator.PodMonitor}
    model = models[manifest["kind"]].model_validate(manifest)
    assert model.model_dump(mode="json", by_alias=True, exclude_unset=True) == manifest


def validate(manifests: dict[str, Manifest]) -> None:
    for kind, manifest in manifests.items():
        if kind in ("ScaledObject", "PodMonitor"):
            validate_custom(manifest)
            continue
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_manifest_is_as_its_schema_says(name: str) -> None:
    manifests = overlay(name)
    assert set(manifests) == {
        "ConfigMap",
        "Deployment",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "PodMonitor",
        "ScaledObject",
        "Service",
        "ServiceAccount",
    }
    validate(manifests)


def test_what_is_not_in_a_schema_is_noticed() -> None:
    """The checks above can fail."""
    deployment = {**overlay("cpu")["Deployment"], "spek": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)
    monitor = overlay("cpu")["PodMonitor"]
    with pytest.raises(AssertionError):
        validate_custom({**monitor, "spec": {**monitor["spec"], "jobLable": "x"}})


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_optional_components_fit(name: str, tmp_path: Path) -> None:
    manifests = with_components(name, tmp_path, "model-volume", "api-keys")
    validate(manifests)
    mounts = {mount["name"]: mount for mount in container(manifests)["volumeMounts"]}
    assert mounts["models"]["readOnly"] is True
    model = manifests["ConfigMap"]["data"]["VITRINE_MODEL"]
    assert model.startswith(mounts["models"]["mountPath"] + "/")
    ports = [rule["ports"] for rule in manifests["NetworkPolicy"]["spec"]["egress"]]
    assert {port["port"] for rule in ports for port in rule} == {53}, "a way out is left"
    (endpoint,) = manifests["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"]["credentials"]["name"] == "vitrine-api-keys"
    names = [variable["name"] for variable in container(manifests)["env"]]
    assert "VITRINE_API_KEYS" in names


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_select_the_pods_and_nothing_else(name: str) -> None:
    manifests = overlay(name)
    deployment = manifests["Deployment"]["spec"]
    assert deployment["template"]["metadata"]["labels"] == OWN_LABEL
    assert deployment["selector"] == {"matchLabels": OWN_LABEL}
    assert manifests["Service"]["spec"]["selector"] == OWN_LABEL
    for kind, field in (
        ("PodDisruptionBudget", "selector"),
        ("PodMonitor", "selector"),
        ("NetworkPolicy", "podSelector"),
    ):
        assert manifests[kind]["spec"][field] == {"matchLabels": OWN_LABEL}, kind
    dns = manifests["NetworkPolicy"]["spec"]["egress"][0]["to"][0]
    assert dns["podSelector"] == {"matchLabels": {"k8s-app": "kube-dns"}}
    assert manifests["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == "vitrine"
    assert "replicas" not in deployment, "every apply would undo the autoscaler"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_pod_is_what_the_restricted_standard_asks_for(name: str) -> None:
    spec, own = pod(overlay(name)), container(overlay(name))["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False
    assert own["readOnlyRootFilesystem"] is True
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert spec["automountServiceAccountToken"] is False
    user = str(spec["securityContext"]["runAsUser"])
    assert f"USER {user}:{user}" in (ROOT / "Dockerfile").read_text()
    writable = {mount["mountPath"] for mount in container(overlay(name))["volumeMounts"]}
    assert writable == {"/tmp", "/cache"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_pod_that_ends_is_left_the_time_that_its_server_takes(name: str) -> None:
    manifests = overlay(name)
    before = container(manifests)["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = float(manifests["ConfigMap"]["data"]["VITRINE_DRAIN_S"])
    grace = pod(manifests)["terminationGracePeriodSeconds"]
    assert grace >= before + drain + LAST_BYTES_S + 5
    assert drain == Settings.model_fields["drain_s"].default


def test_each_overlay_asks_for_its_machine() -> None:
    cpu, gpu = (container(overlay(name))["resources"] for name in OVERLAYS)
    threads = int(overlay("cpu")["ConfigMap"]["data"]["VITRINE_THREADS"])
    assert threads < int(cpu["limits"]["cpu"]), "nothing is left to the API process"
    assert cpu["requests"] == cpu["limits"]
    assert gpu["limits"]["nvidia.com/gpu"] == gpu["requests"]["nvidia.com/gpu"] == "1"
    stages = {name: container(overlay(name))["image"].partition(":")[2] for name in OVERLAYS}
    for stage in stages.values():
        assert f" AS {stage}\n" in (ROOT / "Dockerfile").read_text()


def test_a_server_with_these_settings_answers_the_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the pod gets as environment, arguments and probes, on a real server."""
    manifests = overlay("cpu")
    for name, value in manifests["ConfigMap"]["data"].items():
        monkeypatch.setenv(name, value)
    settings = {name: os.environ[name] for name in manifests["ConfigMap"]["data"]}
    flags = [f"--{k.removeprefix('VITRINE_').lower().replace('_', '-')}" for k in settings]
    words = [word for pair in zip(flags, settings.values(), strict=True) for word in pair]
    assert container(manifests)["args"] == ["serve"]
    probes = {kind: container(manifests)[f"{kind}Probe"] for kind in ("startup", "readiness")}
    with running_server(tmp_path, *words, "--threads", "1") as server:
        for probe in (*probes.values(), container(manifests)["livenessProbe"]):
            assert probe["httpGet"]["port"] == "http"
            assert httpx2.get(server.url + probe["httpGet"]["path"]).status_code == 200
        monitor = manifests["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["path"]
        text = httpx2.get(server.url + monitor).text
        assert "vitrine_requests_in_flight" in text
        assert server.stop(signal.SIGTERM) == 0


def test_service_links_would_stop_the_server() -> None:
    """Why the pods switch them off."""
    for name in OVERLAYS:
        assert pod(overlay(name))["enableServiceLinks"] is False
    environment = os.environ | {
        "VITRINE_SERVICE_HOST": "10.0.0.1",
        "VITRINE_PORT": "tcp://10.0.0.1:8000",
    }
    command = [sys.executable, "-m", "service", "serve"]
    began = time.monotonic()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0, f"it served for {time.monotonic() - began:.0f} s"
    assert "VITRINE_SERVICE_HOST is not a setting" in done.stderr


def test_the_autoscaler_asks_for_metrics_that_exist(tmp_path: Path) -> None:
    with running_server(tmp_path, "--threads", "1") as server:
        text = httpx2.get(f"{server.url}/metrics").text
    for trigger in overlay("cpu")["ScaledObject"]["spec"]["triggers"]:
        name = trigger["metadata"]["query"].removeprefix("sum(").partition("{")[0]
        assert f"\n{name} " in text, name
        assert 'job="vitrine"' in trigger["metadata"]["query"]
    assert overlay("cpu")["PodMonitor"]["spec"]["jobLabel"] in OWN_LABEL
