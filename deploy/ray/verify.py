"""What is promised of Vitrine on Ray, shown on a local cluster of two replicas on CPUs:

    python -m deploy.ray.verify                  # all of it, some minutes
    python -m deploy.ray.verify --only kill --seconds 10

stream   a stream comes through Ray's proxy token by token, and says what `vitrine serve` says
gone     a client that goes away cancels its request
speed    two replicas make --ratio (1.7) times the tokens of one; asked for only where cores are
kill     a replica killed under load costs no request that had not begun; it is replaced, and its
         engine does not outlive it
update   a rolling update under load costs nothing
session  requests of one X-Session-Id meet their prefix again, and resume their streams
parts    a replica of --tensor-parallel-size 2 has two GPUs of its own by a placement group and a
         process for each; one of these killed under load costs nothing (the GPUs are numbers
         that Ray gives away, the computing is done on the CPU)

Ends with 1 at the first thing that does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import psutil
import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.util import placement_group_table

from deploy.ray.app import Options, application
from deploy.ray.load import Load, Stream, generate, read

PROMPT = "Once upon a time, in a big forest, there lived a little bear who liked to read. " * 8
REPLICA = "ray::ServeReplica:vitrine:"
SETTLE_S = 30.0


def check(held: object, what: str) -> None:
    """Say that it held, or end."""
    print(f"    {'ok' if held else 'DOES NOT HOLD'}: {what}", flush=True)
    if not held:
        sys.exit(1)


class Cluster:
    """Ray on this machine, with the application on it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.url = f"http://127.0.0.1:{arguments.port}"
        # As many logical cores as replicas ask for, also on a smaller machine; `speed` looks at
        # the real ones.
        ray.init(num_cpus=16, num_gpus=4, include_dashboard=False, log_to_driver=False)
        serve.start(
            http_options=HTTPOptions(host="127.0.0.1", port=arguments.port, request_timeout_s=660)
        )

    async def deploy(self, num_replicas: int, *flags: str, **options: Any) -> None:
        """Run the application, and wait until it is as asked."""
        flags = ("--threads", str(self.arguments.threads), *self.arguments.serve, *flags)
        wanted = Options(num_replicas=num_replicas, flags=flags, **options)
        await asyncio.to_thread(serve.run, application(wanted), name="vitrine")
        # Those of before still run for a while, and where a session goes changes with their number.
        as_asked = await until(lambda: len(self.replicas()) == num_replicas)
        check(as_asked, f"{num_replicas} replicas run")

    def replicas(self) -> list[psutil.Process]:
        """Processes of replicas that this script's cluster has."""
        found = psutil.Process().children(recursive=True)
        return [process for process in found if REPLICA in _title(process)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


async def until(held: Callable[[], bool], limit_s: float = SETTLE_S) -> bool:
    """Whether it holds before the time is over."""
    deadline = time.monotonic() + limit_s
    while not held() and time.monotonic() < deadline:  # noqa: ASYNC110 - processes, no events
        await asyncio.sleep(0.1)
    return held()


@asynccontextmanager
async def load_on(cluster: Cluster, num_streams: int | None = None) -> AsyncIterator[Load]:
    """Load for as long as the block lasts; what runs at its end is read to its own."""
    arguments = cluster.arguments
    load = Load(cluster.url, num_streams or arguments.streams, arguments.max_tokens)
    task = asyncio.create_task(load.run())
    try:
        yield load
    finally:
        load.is_over = True
        await task


def report(load: Load) -> None:
    """Print how the streams ended."""
    endings = load.endings()
    print(f"        {dict(endings)}", flush=True)
    for ending in ("lost", "broken"):
        for why in sorted({s.why for s in load.streams if s.ending == ending})[:3]:
            print(f"        {ending}: {why}", flush=True)


async def stream(cluster: Cluster) -> None:
    await cluster.deploy(2)
    async with httpx2.AsyncClient(base_url=cluster.url, timeout=60) as client:
        wish = {"prompt": "Once upon a time", "seed": 1, "max_tokens": 100, "ignore_eos": True}
        found = [await generate(client, {}, **wish) for _ in range(8)]
        first = found[0]
        check(all(one.ending == "finished" for one in found), f"8 streams finished {first.why}")
        check(len({one.text for one in found}) == 1, "all replicas say the same to the same seed")
        spread = first.token_times[-1] - first.token_times[0]
        check(len(first.token_times) > 5, f"{len(first.token_times)} events over {spread:.2f} s")
        answer = (await client.post("/generate", json={"prompt": "", "stream": False})).json()
        check(answer["status"] == 422, "errors are the server's own")
        check((await client.get("/health/ready")).status_code == 200, "ready")


async def gone(cluster: Cluster) -> None:
    await cluster.deploy(1)
    async with httpx2.AsyncClient(base_url=cluster.url, timeout=60) as client:
        wish = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "n": 8}
        async with client.stream("POST", "/generate", json=wish) as response:
            await anext(response.aiter_lines())
        deadline = time.monotonic() + SETTLE_S
        while True:
            lines = (await client.get("/metrics")).text.splitlines()
            mine = [x for x in lines if x.startswith("vitrine_requests_aborted") and "gone" in x]
            aborted = any(float(line.split()[-1]) > 0 for line in mine)
            if aborted or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
    check(aborted, "a client that goes away cancels its request through the proxy")


async def speed(cluster: Cluster) -> None:
    arguments = cluster.arguments
    measured = []
    for num_replicas in (1, 2):
        await cluster.deploy(num_replicas)
        async with load_on(cluster) as load:
            await asyncio.sleep(3)
            began = time.monotonic()
            await asyncio.sleep(arguments.seconds)
            ended = time.monotonic()
        measured.append(load.tokens_per_s(began, ended))
        print(f"        {num_replicas} replicas: {measured[-1]:,.0f} tokens/s", flush=True)
    ratio = measured[1] / measured[0]
    cores = os.cpu_count() or 1
    words = f"two replicas make {ratio:.2f} of one ({cores} cores, load {os.getloadavg()[0]:.1f})"
    # Two engines, two APIs, the proxy, and these clients.
    if cores >= 2 * arguments.threads + 4:
        check(ratio >= arguments.ratio, words)
    else:
        print(f"    {words}; too few cores here to ask for {arguments.ratio}", flush=True)


async def kill(cluster: Cluster) -> None:
    await cluster.deploy(2)
    async with load_on(cluster) as load:
        await asyncio.sleep(cluster.arguments.seconds / 2)
        victim, *others = cluster.replicas()
        check(len(others) == 1, "one other is there")
        engines = [one for one in victim.children() if "service.engine" in _title(one)]
        victim.kill()
        killed_at = time.monotonic()
        replaced = await until(lambda: len(cluster.replicas()) == 2, 60)
        check(replaced, f"a replica is in its place after {time.monotonic() - killed_at:.1f} s")
        check(
            engines and await until(lambda: not any(one.is_running() for one in engines)),
            f"its {len(engines)} engine processes ended with it",
        )
        await asyncio.sleep(cluster.arguments.seconds / 2)
    report(load)
    check(load.endings()["finished"], "requests were finished")
    check(not load.endings()["lost"], "no request that had not begun was lost")
    broken = load.endings()["broken"]
    check(
        broken <= load.num_streams, f"{broken} that had begun were broken off, at most one a client"
    )


async def update(cluster: Cluster) -> None:
    await cluster.deploy(2)
    before = {process.pid for process in cluster.replicas()}
    async with load_on(cluster) as load:
        await asyncio.sleep(cluster.arguments.seconds / 2)
        began = time.monotonic()
        await cluster.deploy(2, "--served-model-name", "updated")
        took = time.monotonic() - began
        await asyncio.sleep(cluster.arguments.seconds / 2)
    report(load)
    after = {process.pid for process in cluster.replicas()}
    check(not before & after, f"other replicas, after {took:.1f} s")
    async with httpx2.AsyncClient(base_url=cluster.url, timeout=60) as client:
        names = {(await client.get("/info")).json()["model"] for _ in range(8)}
    check(names == {"updated"}, "which say so")
    check(set(load.endings()) == {"finished"}, "every request was finished")


async def session(cluster: Cluster) -> None:
    await cluster.deploy(2, route="session")
    async with httpx2.AsyncClient(base_url=cluster.url, timeout=60) as client:
        for name in ("bear", "fox", "owl", "hare"):
            headers = {"X-Session-Id": name}
            wish = {"prompt": f"{name}. {PROMPT}", "max_tokens": 8}
            found = [await generate(client, headers, **wish) for _ in range(4)]
            cached = [one.cached_tokens for one in found]
            check(all(count > 0 for count in cached[1:]), f"{name}: {cached} tokens were cached")
            one = await generate(client, headers, **wish, detach_s=30)
            resumed = Stream()
            async with client.stream("GET", f"/generate/{one.id}", headers=headers) as response:
                await read(response, resumed)
            check(resumed.text == one.text != "", f"{name}: the stream came again")


async def parts(cluster: Cluster) -> None:
    flags = ("--tensor-parallel-size", "2", "--device", "cpu", "--dtype", "float32")
    await cluster.deploy(2, *flags, num_cpus=2, num_gpus=2)
    groups = [one for one in placement_group_table().values() if one["state"] == "CREATED"]
    shapes = [list(one["bundles"].values()) for one in groups if one["strategy"] == "STRICT_PACK"]
    check(shapes == [[{"CPU": 2.0, "GPU": 2.0}]] * 2, f"placement groups of {shapes}")
    given = [visible_gpus(replica) for replica in cluster.replicas()]
    check(all(len(gpus) == 1 for gpus in given), "all processes of a replica see the same GPUs")
    numbers = sorted(",".join(gpus.pop() for gpus in given).split(","))
    check(numbers == ["0", "1", "2", "3"], "each two of its own")
    async with load_on(cluster, 4) as load:
        await asyncio.sleep(cluster.arguments.seconds / 3)
        victim = ranks_of(cluster.replicas()[0])[0]
        victim.kill()
        await asyncio.sleep(cluster.arguments.seconds / 3)
    report(load)
    check(set(load.endings()) == {"finished"}, "a rank was killed, and every request was finished")
    replica, _ = cluster.replicas()
    check(await until(lambda: bool(ranks_of(replica))), "there is another rank in its place")
    ranks = ranks_of(replica)
    replica.kill()
    ended = await until(lambda: not any(rank.is_running() for rank in ranks))
    check(ended, f"the {len(ranks)} other ranks of a killed replica end with it")


def ranks_of(replica: psutil.Process) -> list[psutil.Process]:
    """The processes under a replica that have a part of its model, beside the engine's own."""
    found = replica.children(recursive=True)
    return [process for process in found if "service.engine.rank" in _title(process)]


def visible_gpus(replica: psutil.Process) -> set[str]:
    """What each engine process and each rank may use."""
    family = replica.children(recursive=True)
    engines = [process for process in family if "service.engine" in _title(process)]
    return {process.environ().get("CUDA_VISIBLE_DEVICES", "") for process in engines}


PHASES: dict[str, Callable[[Cluster], Coroutine[Any, Any, None]]] = {
    phase.__name__: phase for phase in (stream, gone, speed, kill, update, session, parts)
}


async def run(cluster: Cluster, names: list[str]) -> None:
    """The phases, one after the other."""
    for name in names:
        print(name, flush=True)
        await PHASES[name](cluster)


def main() -> None:
    """Start a cluster, verify, end it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--seconds", type=float, default=30, help="of each measurement")
    parser.add_argument("--streams", type=int, default=32, help="clients at a time")
    parser.add_argument("--max-tokens", type=int, default=100, help="of each request")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of a replica")
    parser.add_argument("--ratio", type=float, default=1.7, help="asked for in `speed`")
    parser.add_argument(
        "--serve", type=shlex.split, default=[], help="more flags of `vitrine serve`, in one string"
    )
    parser.add_argument("--port", type=int, default=8123)
    arguments = parser.parse_args()
    cluster = Cluster(arguments)
    try:
        asyncio.run(run(cluster, arguments.only))
    finally:
        serve.shutdown()
        ray.shutdown()
    print("everything held", flush=True)


if __name__ == "__main__":
    main()
