"""Vitrine on Ray: the arguments of the application, and a real local cluster.

At length, with speed and a rolling update: `python -m deploy.ray.verify`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from service.settings import SettingsError
from tests.servers import free_port

ROOT = Path(__file__).parents[2]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, at its import
    pytest.importorskip("ray.serve", reason="ray is not installed: deploy/ray is NOT tested")

    from deploy.ray import app as ray_app
    from deploy.ray.load import Load, Stream


def config(**arguments: Any) -> Any:
    """What Ray would be told of the deployment."""
    application = ray_app.application(ray_app.Options(**arguments))
    return application._bound_deployment


def test_arguments_of_the_command_line_are_text() -> None:
    options = ray_app.Options(num_replicas="2", flags='["--threads", "4"]')
    assert options.num_replicas == 2
    assert options.flags == ("--threads", "4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"replicas": 2}, "replicas"),
        ({"num_replicas": 3, "max_replicas": 2}, "max_replicas 2 < num_replicas 3"),
        ({"route": "prefix"}, "route"),
        ({"num_replicas": 0}, "num_replicas"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ray_app.Options(**arguments)


@pytest.mark.parametrize(
    "flags", [("--port", "9000"), ("--tls-cert", "a.pem"), ("--slow-reader-s", "5")]
)
def test_settings_of_the_connection_are_refused(flags: tuple[str, ...]) -> None:
    """Ray's proxy listens; they would be accepted and ignored."""
    with pytest.raises(SettingsError, match=f"{flags[0]} has no effect under Ray"):
        ray_app.application(ray_app.Options(flags=flags))


def test_what_ray_is_told_follows_from_the_settings() -> None:
    flags = ("--max-num-seqs", "8", "--max-queue-requests", "4", "--drain-s", "7")
    one = config(flags=flags, num_replicas=2, num_gpus=1)
    assert one.num_replicas == 2
    assert one.max_ongoing_requests >= 8 + 4, "the server's own queue could not fill"
    assert one._deployment_config.graceful_shutdown_timeout_s == 7
    assert one.ray_actor_options["num_gpus"] == 1
    scaled = config(flags=flags, num_replicas=2, max_replicas=4)._deployment_config
    assert scaled.autoscaling_config.target_ongoing_requests == 6
    assert scaled.autoscaling_config.min_replicas == 2
    assert scaled.autoscaling_config.max_replicas == 4


def test_all_parts_of_a_model_are_one_bundle() -> None:
    flags = ("--tensor-parallel-size", "2")
    pair = config(flags=flags, num_cpus=3, num_gpus=2)._replica_config
    assert pair.placement_group_bundles == [{"CPU": 3, "GPU": 2}]
    assert pair.placement_group_strategy == "STRICT_PACK"
    assert config(flags=flags, num_cpus=3)._replica_config.placement_group_bundles == [{"CPU": 3}]
    assert config(num_gpus=1)._replica_config.placement_group_bundles is None
    with pytest.raises(SettingsError, match=r"num_gpus 1 of a replica: .* 2 takes 2, or 0"):
        config(flags=flags, num_gpus=1)
    with pytest.raises(SettingsError, match=r"num_gpus 2 of a replica: .* 1 takes 1, or 0"):
        config(num_gpus=2)


def test_the_configuration_file_has_arguments_that_exist() -> None:
    from ray.serve.schema import ServeDeploySchema

    document = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(document)
    (application,) = schema.applications
    assert application.import_path == "deploy.ray.app:application"
    ray_app.Options(**application.args)
    assert schema.http_options.request_timeout_s > 600


def test_speed_counts_the_tokens_between_two_times() -> None:
    load = Load("", 1, 10)
    load.streams = [
        Stream(ending="finished", num_tokens=8, token_times=[1.0, 2.0, 3.0, 4.0]),
        Stream(ending="broken", token_times=[2.5]),
    ]
    assert load.tokens_per_s(1.5, 3.5) == 3 * 2 / 2
    assert load.endings() == {"finished": 1, "broken": 1}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_replicas_stream_and_one_may_die() -> None:
    flags = ("--seconds", "6", "--streams", "4", "--max-tokens", "40", "--port", str(free_port()))
    command = [sys.executable, "-m", "deploy.ray.verify", "--only", "stream", "kill", *flags]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=380,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1500:]
    assert "no request that had not begun was lost" in done.stdout
