"""Health, /info, /metrics, and the tokenizer's routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_prometheus

from service.api.app import create_app
from service.api.limits import ApiLimits
from service.health import STATES
from tests.api.fake_engine import INFO, VOCAB_SIZE, FakeEngine, say

Houses = Callable[..., Any]


@pytest.mark.parametrize("state", ["idle", "busy"])
async def test_ready_when_the_engine_can_take_a_request(house: Houses, state: Any) -> None:
    h = house()
    h.engine.state = state
    async with h.client() as client:
        for path, status in (("/health/live", "live"), ("/health/ready", "ready")):
            response = await client.get(path)
            assert (response.status_code, response.json()) == (200, {"status": status})


@pytest.mark.parametrize("state", [state for state in STATES if state not in ("idle", "busy")])
async def test_not_ready_says_why(house: Houses, state: Any) -> None:
    h = house()
    h.engine.state, h.engine.state_reason = state, "for this reason"
    async with h.client() as client:
        response = await client.get("/health/ready")
        assert response.status_code == 503
        assert response.json()["detail"] == "for this reason"
        assert int(response.headers["retry-after"]) >= 1
        assert (await client.get("/health/live")).status_code == 200


@pytest.mark.parametrize("missing", ["model", "tokenizer"])
async def test_while_loading(house: Houses, missing: str) -> None:
    h = house()
    if missing == "model":
        h.engine.info = None
    else:
        h.app = create_app(ApiLimits(), h.engine, lambda: None, "case")
    async with h.client() as client:
        responses = [
            await client.get("/health/ready"),
            await client.get("/info"),
            await client.post("/generate", json={"prompt": "a"}),
            await client.post("/tokenize", json={"text": "a"}),
            await client.post("/detokenize", json={"token_ids": [1]}),
        ]
        for response in responses:
            assert response.status_code == 503
            assert "being loaded" in response.json()["detail"]
            assert int(response.headers["retry-after"]) >= 1
        # What is wrong in itself need not wait for the model.
        assert (await client.post("/generate", json={})).status_code == 422
        assert (await client.get("/metrics")).status_code == 200


async def test_info(house: Houses) -> None:
    async with house().client() as client:
        info = (await client.get("/info")).json()
    assert info["model"] == "case"
    assert info["parameters"] == INFO.num_parameters
    assert info["kv_cache"] == {"tokens": 1024, "bytes": 65536, "blocks": 64, "block_size": 16}
    assert info["limits"]["max_body_bytes"] == 4 * 2**20
    assert "api_keys" not in info["limits"]
    assert {"python", "torch", "vitrine", "tokenizers"} <= set(info["versions"])


async def test_metrics_add_up_and_parse(house: Houses) -> None:
    h = house(say(65, 66))
    async with h.client() as client:
        await client.post("/generate", json={"prompt": [1, 2, 3]})
        await client.post("/generate", json={"prompt": ""})
        plain = await client.get("/metrics")
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        open_metrics = await client.get("/metrics", headers=accept)
        odd = await client.get("/metrics", headers={"accept": "a/b;version=;;,,\u00e9".encode()})
    assert plain.headers["content-type"].startswith("text/plain")
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert open_metrics.text.endswith("# EOF\n")
    assert odd.status_code == 200
    for parse, text in ((parse_prometheus, plain.text), (parse_openmetrics, open_metrics.text)):
        samples = {
            (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
            for family in parse(text)
            for sample in family.samples
        }
        assert all(family.documentation for family in parse(text))
        assert samples["vitrine_requests_accepted_total", "/generate"] == 1
        assert samples["vitrine_requests_finished_total", "length", "/generate"] == 1
        assert samples["vitrine_requests_rejected_total", "invalid-request", "/generate"] == 1
        assert samples["vitrine_requests_in_flight",] == 0
        assert samples["vitrine_prompt_tokens_total",] == 3
        assert samples["vitrine_generated_tokens_total",] == 2
        assert samples["vitrine_engine_sequences_running",] == 3
        assert samples["vitrine_kv_blocks", "free"] == 60
        states = {key[1]: value for key, value in samples.items() if "engine_state" in key[0]}
        assert states == {state: float(state == "idle") for state in STATES}
        assert samples["vitrine_engine_restarts_total", "stall"] == 0


def test_two_apps_have_their_own_metrics() -> None:
    apps: list[FastAPI] = [
        create_app(ApiLimits(), FakeEngine(), lambda: None, "case") for _ in range(2)
    ]
    assert apps[0].state.context.metrics is not apps[1].state.context.metrics


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
async def test_text_to_ids_and_back(house: Houses, text: str) -> None:
    h = house()
    async with h.client() as client:
        answer = (await client.post("/tokenize", json={"text": text})).json()
        back = await client.post("/detokenize", json={"token_ids": answer["token_ids"]})
    assert answer["count"] == len(answer["token_ids"]) == len(answer["tokens"])
    assert answer["token_ids"] == h.tokenizer.encode(text)
    for token, token_id in zip(answer["tokens"], answer["token_ids"], strict=True):
        assert token["id"] == token_id
        if "\ufffd" not in token["text"]:
            assert token["text"] == text[token["start"] : token["end"]]
    assert back.json() == {"text": text}


async def test_a_long_text_is_tokenized(house: Houses) -> None:
    h = house()
    async with h.client() as client:
        answer = (await client.post("/tokenize", json={"text": "case " * 4000})).json()
    assert answer["token_ids"] == h.tokenizer.encode("case " * 4000)


async def test_special_tokens(house: Houses) -> None:
    async with house().client() as client:
        body = {"token_ids": [0, 65]}
        hidden = (await client.post("/detokenize", json=body)).json()["text"]
        shown = await client.post("/detokenize", json=body | {"skip_special_tokens": False})
    assert shown.json()["text"] == "<|endoftext|>" + hidden


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {"text": "x" * 100_001}, "text"),
        ("/tokenize", {"text": 5}, "text"),
        ("/tokenize", {"text": "a", "model": "b"}, "model"),
        ("/tokenize", {}, "text"),
        ("/detokenize", {"token_ids": [0] * 100_001}, "token_ids"),
        ("/detokenize", {"token_ids": [VOCAB_SIZE]}, "token_ids"),
        ("/detokenize", {"token_ids": [-1]}, "token_ids"),
        ("/detokenize", {"token_ids": "5"}, "token_ids"),
    ],
)
async def test_tokenizer_bodies_are_bounded(
    house: Houses, path: str, body: dict[str, Any], field: str
) -> None:
    async with house().client() as client:
        response = await client.post(path, json=body)
    assert response.status_code == 422
    assert response.json()["field"] == field
