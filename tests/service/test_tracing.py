"""Traces: what a collector is sent, by a real server and of a scripted engine."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.api.app import create_app
from service.api.limits import ApiLimits
from service.client import QueueFullError
from service.tracing import start_tracing, trace_with
from tests.api.conftest import make_tokenizer
from tests.api.fake_engine import FakeEngine, say
from tests.servers import running_server

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def collector() -> Iterator[tuple[str, list[Span]]]:
    """An OTLP receiver: its address, and the spans it was sent."""
    spans: list[Span] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", spans
        finally:
            server.shutdown()
            thread.join()


def attributes(span: Span) -> dict[str, object]:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


def test_a_server_sends_its_spans_and_takes_the_caller_s_trace(tmp_path: Path) -> None:
    with (
        collector() as (url, spans),
        running_server(tmp_path, "--otlp-endpoint", url, "--threads", "1") as server,
    ):
        body = {"prompt": "Once", "max_tokens": 5, "ignore_eos": True, "stream": False}
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        httpx2.post(f"{server.url}/generate", json=body, headers=headers, timeout=60)
        assert server.stop() == 0, server.log.read_text()
    (root,) = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert root.name == "POST /generate"
    assert {
        "http.route": "/generate",
        "http.response.status_code": 200,
        "vitrine.request_id": "mine",
        "gen_ai.request.model": "stories",
        "gen_ai.usage.output_tokens": 5,
    }.items() <= attributes(root).items()
    phases = [span for span in spans if span.parent_span_id == root.span_id]
    assert [span.name for span in phases] == ["queue", "prefill", "decode"]
    edges = [root.start_time_unix_nano]
    for span in phases:
        edges += [span.start_time_unix_nano, span.end_time_unix_nano]
    edges.append(root.end_time_unix_nano)
    assert edges == sorted(edges), "one after another, and within the request"
    assert edges[-1] - edges[0] < 60e9
    assert "Once" not in str(spans)


async def test_spans_of_several_continuations_and_of_refusals() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    engine = FakeEngine(say(5, 6))
    tracing = trace_with(provider, "case")
    app = create_app(ApiLimits(), engine, make_tokenizer, "case", on_complete=[tracing.on_complete])
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        body = {"prompt": "a", "n": 2, "stream": False}
        await client.post("/generate", json=body, headers={"traceparent": "nonsense"})
        await client.get("/health/live")
        names = [span.name for span in exporter.get_finished_spans()]
        assert sorted(names) == sorted([*["queue", "prefill", "decode"] * 2, "POST /generate"])
        engine.refuse = QueueFullError("full", 1)
        await client.post("/generate", json=body)
        engine.refuse = RuntimeError("oops")
        await client.post("/generate", json=body)
    *_, refused, failed = exporter.get_finished_spans()
    assert refused.attributes["http.response.status_code"] == 429
    assert (refused.status.is_ok, failed.status.is_ok) == (True, False)
    tracing.shutdown()


def test_off_unless_an_endpoint_is_named() -> None:
    assert start_tracing(None, "case", {}) is None
    off = {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}
    assert start_tracing("http://x", "case", off) is None


def test_the_variables_of_opentelemetry_turn_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as (url, spans):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        tracing = start_tracing(None, "case")
        assert tracing is not None
        tracing.shutdown()
    assert spans == []


def test_nothing_of_it_is_imported_when_off() -> None:
    code = (
        "import sys, service.tracing as t; t.start_tracing(None, 'case', {}); "
        "sys.exit(', '.join(m for m in sys.modules if m.startswith('opentelemetry.sdk')) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
