"""Locust users that read streams as a client does.

FastHttpUser's client with `stream=True` and a read up to each event's end: of the clients measured
(`python -m loadtests.load.http_clients`) it is honest about each event's moment, as `requests`
is too, and reads a whole event in one call; iterating over its response waits for whole
blocks and is not. What a user fires:

POST  /generate             completion: from when the request was due to the end of its stream
TTFT  /generate             from when it was due to the first token
CONNECT                     making a connection; a user keeps its own from one request to the next
ITL   /generate             every pause between two events with tokens
TPOT  /generate             mean time of a token after the first
tok/s of a stream           not a time: tokens per second of one stream

A stream that breaks a promise (integrity.py) is a failure of POST.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from itertools import count
from typing import Any, ClassVar

import gevent
import msgspec
from gevent.pool import Group
from geventhttpclient.response import HTTPParseError
from locust import FastHttpUser, events, task
from locust.env import Environment
from locust.exception import StopUser

from loadtests.load.connections import time_connections
from loadtests.load.events import END, parse
from loadtests.load.integrity import ChatStream, Expected, GenerateStream, Received
from loadtests.load.options import lengths_of, samples_folder
from loadtests.load.samples import Sample, SampleFile
from loadtests.load.workloads import Wish, messages, wishes

LIMIT_S = 600.0
STOPPING = ("stopping", "stopped", "cleanup")
_numbers = count()


class StreamUser(FastHttpUser):
    """One request after the other; in pattern poisson a dispatcher of many."""

    abstract = True
    concurrency = 65536  # connections of a dispatcher
    network_timeout = LIMIT_S
    path: ClassVar[str]

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.options = options
        # Users of several worker processes must not be each other's twins; those of the first are
        # numbered as the bench's.
        who = f"{next(_numbers)}"
        if self.environment.runner.worker_index:
            who = f"{self.environment.runner.worker_index}.{who}"
        self.rng = random.Random(f"{options.load_seed} {who}")
        # As in service/bench/workload.py.
        self.thinking = random.Random(f"{options.load_seed} user {who} thinking")
        self.key = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        self.is_prepared = False
        self.sending: dict[gevent.Greenlet, Sample] = {}  # by the greenlet that sends it
        time_connections(self.client, self._connected)

    @task
    def load(self) -> None:
        """A closed loop ends one request before it begins the next; an open one does not wait."""
        if not self.is_prepared:
            self.prepare()
            self.is_prepared = True
            if self.options.pattern != "poisson":
                gevent.sleep(self.wait_time())
        if self.options.pattern == "poisson":
            self._dispatch()
        else:
            self.request_once(time.monotonic_ns())

    def wait_time(self) -> float:
        """Locust waits so long between two requests of a user."""
        mean_s: float = self.options.think_s
        return self.thinking.expovariate(1 / mean_s) if mean_s else 0.0

    def prepare(self) -> None:
        """Ask the server what must be known. Raises `StopUser`, a failure having been reported."""
        raise NotImplementedError

    def request_once(self, due_ns: int) -> None:
        """Ask for one stream, read it, report it."""
        raise NotImplementedError

    def _dispatch(self) -> None:
        """Requests at random moments until the run stops; then those in flight may end, within
        Locust's --stop-timeout."""
        rate = self.options.rate / self.options.dispatchers
        due_ns, in_flight = time.monotonic_ns(), Group()
        try:
            while True:
                due_ns += int(1e9 * self.rng.expovariate(rate))
                while (left_s := (due_ns - time.monotonic_ns()) / 1e9) > 0:
                    gevent.sleep(min(left_s, 0.5))
                    if self.environment.runner.state in STOPPING:
                        in_flight.join()
                        return
                in_flight.add(gevent.spawn(self.request_once, due_ns))
        finally:
            in_flight.kill()

    def read(
        self, body: dict[str, Any], due_ns: int, stream: GenerateStream | ChatStream
    ) -> Received:
        """POST and read to the end; every figure is reported on the way."""
        sample = Sample(self.path, due_ns, time.monotonic_ns())
        self.sending[gevent.getcurrent()] = sample
        try:
            with self.client.post(
                self.path,
                data=msgspec.json.encode(body),
                headers={"content-type": "application/json", "accept": "text/event-stream"}
                | self.key,
                stream=True,
                catch_response=True,
            ) as response:
                sample.status = response.status_code
                failure = self._read_events(response, stream, sample)
                response.request_meta["response_time"] = _ms(time.monotonic_ns() - due_ns)
                response.request_meta["response_length"] = sum(map(len, stream.received.text))
                if failure:
                    response.failure(failure)
                else:
                    response.success()
        except gevent.GreenletExit:
            sample.was_cut = True
            raise
        finally:
            self.sending.pop(gevent.getcurrent(), None)
            self._book(sample, stream.received)
        return stream.received

    def _read_events(self, response: Any, stream: Any, sample: Sample) -> str:
        """What went wrong, in words; empty when nothing did."""
        if sample.status != 200:
            sample.failure = f"status {sample.status}: {(response.text or '')[:200]}"
            return sample.failure
        last_ns = None
        try:
            while block := response.stream.readline(END):
                now_ns = time.monotonic_ns()
                event = parse(bytes(block))
                sample.id = sample.id or event.id.rpartition(":")[0]
                tokens = stream.take(event)
                if not tokens:
                    continue
                sample.stamps_ns.append(now_ns)
                sample.counts.append(tokens)
                if last_ns is None:
                    sample.first_ns = now_ns
                    self.fire("TTFT", _ms(now_ns - sample.due_ns))
                else:
                    self.fire("ITL", _ms(now_ns - last_ns))
                last_ns = now_ns
        except (OSError, HTTPParseError, ValueError, KeyError) as error:
            # Cut off, no HTTP, no JSON, no such field.
            stream.received.wrong(f"{type(error).__name__}: {error}")
        sample.end_ns = time.monotonic_ns()
        received: Received = stream.end()
        if isinstance(stream, ChatStream):
            _spread(sample, received.num_tokens)
        if sample.tpot_s:
            self.fire("TPOT", 1e3 * sample.tpot_s)
            self.fire("tok/s", 1 / sample.tpot_s)
        sample.failure = received.failure or "; ".join(received.violations)
        return sample.failure

    def _book(self, sample: Sample, received: Received) -> None:
        for name in ("num_tokens", "prompt_tokens", "cached_prompt_tokens", "finish_reason"):
            setattr(sample, name, getattr(received, name))
        sample.timing = received.timing
        if (file := _files.get(self.environment)) is not None:
            file.write(sample)

    def _connected(self, now_ns: int, took_ns: int) -> None:
        if took_ns:
            self.fire("CONNECT", _ms(took_ns))
        if (sample := self.sending.get(gevent.getcurrent())) is not None:
            sample.sent_ns, sample.connect_ns = now_ns, took_ns

    def fire(self, kind: str, value: float) -> None:
        """A Locust event of its own: it has a row, percentiles and a place in the CSV."""
        self.environment.events.request.fire(
            request_type=kind,
            name=self.path,
            response_time=value,
            response_length=0,
            exception=None,
            context={},
        )


class GenerateUser(StreamUser):
    """POST /generate."""

    path = "/generate"

    def prepare(self) -> None:
        with self.client.get("/info", headers=self.key, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"/info answered {answer.status_code}")
                raise StopUser
            info = answer.json()
        options = self.options
        self.wishes: Iterator[Wish] = wishes(
            options.workload,
            lengths_of(options),
            info["vocab_size"],
            info["context_length"],
            self.rng,
            options.load_seed,
        )

    def request_once(self, due_ns: int) -> None:
        wish = next(self.wishes)
        body = {
            "prompt": wish.prompt,
            "max_tokens": wish.max_tokens,
            "temperature": self.options.temperature,
            "ignore_eos": True,  # lengths are the workload's
        }
        expected = Expected(wish.max_tokens, len(wish.prompt), ignore_eos=True)
        self.read(body, due_ns, GenerateStream(expected))


class ChatUser(StreamUser):
    """POST /v1/chat/completions: conversations of --turns turns, the answers that came in them."""

    path = "/v1/chat/completions"

    def prepare(self) -> None:
        self.history: list[dict[str, str]] = []
        with self.client.get("/v1/models", headers=self.key, catch_response=True) as answer:
            self.model = answer.json()["data"][0]["id"]
        self._need_a_template()

    def request_once(self, due_ns: int) -> None:
        options = self.options
        if len(self.history) >= 2 * options.turns or options.workload != "chat":
            self.history = []
        said = messages(lengths_of(options), self.rng)
        asked = [*self.history, {"role": "user", "content": said}]
        stream = ChatStream(Expected(options.output_len))
        received = self.read(self._body(asked, options.output_len), due_ns, stream)
        answer = {"role": "assistant", "content": "".join(received.text)}
        self.history = [] if received.failure or received.violations else [*asked, answer]

    def _body(self, asked: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": asked,
            "max_tokens": max_tokens,
            "temperature": self.options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _need_a_template(self) -> None:
        """A model without a chat template cannot chat: say so once, and stop."""
        body = self._body([{"role": "user", "content": "Hello"}], 1) | {"stream": False}
        body.pop("stream_options")
        with self.client.post(
            self.path, json=body, headers=self.key, name="has a chat template", catch_response=True
        ) as answer:
            if answer.status_code == 200:
                answer.success()
                return
            words = (answer.json() or {}).get("error", {}).get("message", answer.status_code)
            answer.failure(f"{words}")
        raise StopUser


def _spread(sample: Sample, num_tokens: int) -> None:
    """OpenAI's chunks do not count their tokens: share what usage says among them, evenly."""
    events_seen = len(sample.counts)
    if events_seen:
        each, more = divmod(num_tokens, events_seen)
        sample.counts = [each + (place < more) for place in range(events_seen)]


def _ms(ns: int) -> float:
    return ns / 1e6


_files: dict[Environment, SampleFile] = {}


@events.test_start.add_listener
def _open_samples(environment: Environment, **_: Any) -> None:
    folder = samples_folder(environment.parsed_options)
    if folder is not None:
        _files[environment] = SampleFile(folder)


@events.test_stop.add_listener
def _close_samples(environment: Environment, **_: Any) -> None:
    if (file := _files.pop(environment, None)) is not None:
        file.close()
