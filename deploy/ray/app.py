"""Vitrine on a Ray cluster: the same engine and the same API, a server in every replica.

    serve run deploy.ray.app:application num_replicas=2 flags='["--threads", "4"]'
    serve run deploy/ray/serve.yaml

A replica is what `vitrine serve` makes, an `EngineClient` with its engine process and the app of
`service/api`, with Ray's proxy where uvicorn would be. Ray starts replicas, counts their requests,
replaces the dead and moves traffic at an upgrade; nothing of Vitrine is written twice. What the
proxy changes is in deploy/README.md.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import from_json
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from service import logs
from service.commands.door import api_limits
from service.commands.http_server import make_app
from service.commands.loading import LoadedModel
from service.commands.serve import make_client
from service.grammars import are_installed
from service.grammars.checker import GrammarChecker
from service.settings import Settings, SettingsError, read_settings

# Of the connection, which is Ray's: a server in a replica has none.
NOT_OURS = (
    *("host", "port", "tls_cert", "tls_key", "tls_client_ca"),
    *("max_connections", "slow_reader_s"),
)
POLL_S = 0.05
# Three quarters of what a replica runs at a time: the others are for the time that a new one takes.
TARGET_SHARE = 0.75
SESSION_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"


def _read_json(value: Any) -> Any:
    """On the command line every argument is a string."""
    return from_json(value) if isinstance(value, str) else value


class Options(BaseModel, extra="forbid", frozen=True):
    """Arguments of the application."""

    flags: Annotated[tuple[str, ...], BeforeValidator(_read_json)] = Field(
        (), description="of `vitrine serve`; VITRINE_* variables of the nodes count too"
    )
    num_replicas: int = Field(1, ge=1, description="to begin with, and at least")
    max_replicas: int | None = Field(None, ge=1, description="with it, Ray adds and removes some")
    num_cpus: float = Field(1, gt=0, description="cores of a replica: threads, and one for the API")
    num_gpus: float = Field(
        0, ge=0, description="GPUs of a replica: 0, 1, or --tensor-parallel-size"
    )
    route: Literal["load", "session"] = Field(
        "load",
        description="load: to the less busy of two replicas; session: requests with the same "
        "X-Session-Id to the same one, where their prefix is cached and their stream kept",
    )

    @model_validator(mode="after")
    def _replicas(self) -> Options:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} < num_replicas {self.num_replicas}")
        return self


class Replica:
    """One server: an engine process and the app in front of it."""

    async def __init__(self, flags: tuple[str, ...]) -> None:
        """Returns when requests can be taken: until then Ray sends none. Raises `RuntimeError`
        with the engine's words when it cannot start."""
        settings = replica_settings(flags)
        logs.tell_children(settings.log_level, settings.log_format)
        self._client = make_client(settings)
        self._client.spawn()
        self._model = LoadedModel(settings, self._client)
        self._grammars = GrammarChecker(self._model.get_directory) if are_installed() else None
        self._app, self._on_end = make_app(
            settings, api_limits(settings), self._client, self._model, self._grammars
        )
        await self._model.load()
        while self._app.state.context.unready_reason():
            self.check_health()
            await asyncio.sleep(POLL_S)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    def check_health(self) -> None:
        """Called by Ray, which replaces this replica when it raises. A dead engine is replaced by
        the client and its streams go on, so only one that cannot start at all counts."""
        if self._client.failure:
            raise RuntimeError(self._client.failure)

    async def __del__(self) -> None:
        await self._model.close()
        if self._grammars is not None:
            await self._grammars.close()
        await self._client.stop()
        if self._on_end is not None:
            await asyncio.to_thread(self._on_end)


def replica_settings(flags: tuple[str, ...]) -> Settings:
    """Settings of a replica. Raises `SettingsError` for those that could have no effect."""
    settings = read_settings(Settings, list(flags))
    for name in NOT_OURS:
        if getattr(settings, name) != Settings.model_fields[name].default:
            flag = "--" + name.replace("_", "-")
            raise SettingsError(f"{flag} has no effect under Ray, whose proxy listens")
    return settings


def application(options: Options) -> Application:
    """The Serve application. Raises `SettingsError`."""
    settings = replica_settings(options.flags)
    num_parts = settings.tensor_parallel_size
    # A model in one part may share its GPU: a part of a GPU is something that Ray can give.
    fits = options.num_gpus in (0, num_parts) if num_parts > 1 else options.num_gpus <= 1
    if not fits:
        raise SettingsError(
            f"num_gpus {options.num_gpus:g} of a replica: --tensor-parallel-size {num_parts} takes "
            f"{num_parts}, or 0 to compute on CPUs"
        )
    resources = {"num_cpus": options.num_cpus, "num_gpus": options.num_gpus}
    # All ranks are processes under the replica, so what they need is one bundle: it lies on one
    # node and is given as a whole or not at all, and Ray tells them which GPUs are theirs.
    group: dict[str, Any] = {}
    if num_parts > 1:
        bundle = {"CPU": options.num_cpus, "GPU": options.num_gpus}
        group = {
            "placement_group_bundles": [{name: n for name, n in bundle.items() if n}],
            "placement_group_strategy": "STRICT_PACK",
        }
    autoscaling = None
    if options.max_replicas is not None:
        autoscaling = AutoscalingConfig(
            min_replicas=options.num_replicas,
            initial_replicas=options.num_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=TARGET_SHARE * settings.max_num_seqs,
            upscale_delay_s=15,
            downscale_delay_s=600,
        )
    router: dict[str, Any] = (
        {"request_router_class": SESSION_ROUTER} if options.route == "session" else {}
    )
    make_deployment = serve.deployment(
        # A proxy keeps the router that a deployment had when it first saw its name.
        name=options.route,
        num_replicas=options.num_replicas if autoscaling is None else None,
        autoscaling_config=autoscaling,
        # The server itself bounds its queue, and says 429 and when to come again.
        max_ongoing_requests=2 * (settings.max_num_seqs + settings.max_queue_requests),
        request_router_config=RequestRouterConfig(**router),
        ray_actor_options=resources,
        **group,
        # At an upgrade and when scaling down, running requests have this long.
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        health_check_timeout_s=10,
    )
    deployment: Deployment = make_deployment(serve.ingress()(Replica))
    return deployment.bind(options.flags)
