"""`gymlink serve` without a Gym, over real HTTP: rollouts for agents, weights, and what a trainer may get wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from gymlink.client import GatewayClient
from gymlink.config import PolicySettings
from gymlink.engines import Engine, ScriptedEngine, scripted_logprob
from gymlink.errors import ConfigError, EngineError, GatewayError, RolloutError
from gymlink.serve.control import Control
from gymlink.session import Session
from gymlink.types import ForkCause, Generation, Sampling
from pages import BLOCKS

SECRET = "s3cret"
USER = {"role": "user", "content": "hi"}
MORE = {"role": "user", "content": "more"}


class Learns(ScriptedEngine):
    """A scripted engine whose "weights" are loaded from a folder that must exist."""

    async def load_weights(self, path: str, version: int) -> None:
        if not Path(path).is_dir():  # noqa: ASYNC240 - a test's
            raise EngineError(f"There is no folder {path!r}.")
        await super().load_weights(path, version)


class Fixed:
    """An engine with the weights that it has."""

    max_context = None
    weight_version = 0

    async def generate(self, *_: Any, **__: Any) -> Generation:
        return Generation((1,), (-1.0,), "stop")

    async def aclose(self) -> None:
        pass


@pytest.fixture
def serve(tokenizer: Any, tmp_path: Path) -> Iterator[Callable[..., GatewayClient]]:
    """Starts a gateway and gives a client of it."""
    running: list[Session] = []
    clients: list[GatewayClient] = []
    reply = [*tokenizer.encode("well", add_special_tokens=False), tokenizer.eos_token_id]

    def start(engine: Engine | None = None, **settings: Any) -> GatewayClient:
        parsed = PolicySettings.model_validate(settings)
        session = Session(
            parsed,
            tokenizer=tokenizer,
            engine=engine or Learns(lambda _: reply),
            sampling=Sampling(max_tokens=16),
            run_dir=tmp_path,
            secret=SECRET,
            routes=lambda session: Control(session, parsed, collects=False).routes,
        )
        running.append(session)
        session.start()
        clients.append(GatewayClient(session.url, SECRET))
        return clients[-1]

    yield start
    for client in clients:
        client.close()
    for session in running:
        session.stop()


def ask(base_url: str, api_key: str, messages: list[Any]) -> Any:
    with OpenAI(base_url=base_url, api_key=api_key, max_retries=0) as policy:
        return policy.chat.completions.create(model="policy", messages=messages).choices[0].message


def test_an_agents_rollout_is_one_exact_segment(serve: Callable[..., GatewayClient]) -> None:
    gateway = serve()
    with gateway.rollout(max_tokens=4) as rollout:
        with pytest.raises(RolloutError, match="not been closed here"):
            _ = rollout.segments
        said = ask(rollout.base_url, rollout.api_key, [USER])
        ask(rollout.base_url, rollout.api_key, [USER, said, MORE])
    (segment,) = rollout.segments
    closed = rollout.closed
    assert closed is not None
    assert closed.trained_tokens == closed.sampled_tokens == sum(segment.response_mask)
    assert [(turn.parent, turn.cause) for turn in closed.turns] == [(None, None), (0, None)]
    sampled = zip(segment.response_ids, segment.response_mask, segment.response_logprobs, strict=True)
    assert all(logprob == (scripted_logprob(token) if mask else 0.0) for token, mask, logprob in sampled)
    assert gateway.status().open_rollouts == 0


def test_a_rewritten_history_is_told_with_its_cause(serve: Callable[..., GatewayClient]) -> None:
    gateway = serve()
    with gateway.rollout() as rollout:
        ask(rollout.base_url, rollout.api_key, [USER])
        ask(rollout.base_url, rollout.api_key, [USER, {"role": "assistant", "content": "never said"}, MORE])
    assert rollout.closed is not None
    assert [turn.cause for turn in rollout.closed.turns] == [None, ForkCause.EDITED]
    assert len(rollout.segments) == 2
    opened = gateway.open()
    ask(opened.base_url, opened.api_key, [USER])
    ask(opened.base_url, opened.api_key, [USER])
    closed = gateway.close_rollout(opened.rollout_id, last_turn=0)
    assert closed.segments[-1].turns == (0,)


def test_a_rollouts_key_opens_nothing_else(serve: Callable[..., GatewayClient]) -> None:
    gateway = serve()
    one, other = gateway.open(), gateway.open()
    with pytest.raises(BadRequestError, match="names more than one rollout"):
        ask(other.base_url, one.api_key, [USER])
    for path in ("/gymlink/status", "/gymlink/pause"):
        method = httpx.get if path.endswith("status") else httpx.post
        answer = method(gateway.url + path, headers={"Authorization": f"Bearer {one.api_key}"})
        assert answer.status_code == 404, path  # to this key there is no such thing
        assert answer.json()["error"]["type"] == "not_found_error"
    with GatewayClient(gateway.url, "wrong") as stranger, pytest.raises(GatewayError, match="key is missing or wrong"):
        stranger.status()


def test_a_rollout_that_nobody_closes_is_forgotten(serve: Callable[..., GatewayClient]) -> None:
    gateway = serve()
    opened = gateway.open(deadline_s=0.2)
    until = time.monotonic() + 10
    while gateway.status().open_rollouts:
        assert time.monotonic() < until
        time.sleep(0.05)
    with pytest.raises(GatewayError, match="is not open"):
        gateway.close_rollout(opened.rollout_id)
    with pytest.raises(NotFoundError):
        ask(opened.base_url, opened.api_key, [USER])


def test_what_an_agent_raises_closes_its_rollout(serve: Callable[..., GatewayClient]) -> None:
    gateway = serve()
    with pytest.raises(RuntimeError, match="lost"), gateway.rollout():
        raise RuntimeError("lost")
    assert gateway.status().open_rollouts == 0


def test_weights_are_loaded_between_generations(serve: Callable[..., GatewayClient], tmp_path: Path) -> None:
    gateway = serve()
    with gateway.rollout() as rollout:
        said = ask(rollout.base_url, rollout.api_key, [USER])
        assert gateway.load_weights(str(tmp_path)) == 1
        said = ask(rollout.base_url, rollout.api_key, [USER, said, MORE])
        with gateway.paused() as status:
            assert (status.paused, status.in_flight) == (True, 0)
        ask(rollout.base_url, rollout.api_key, [USER, MORE])
    assert rollout.closed is not None
    assert [turn.weight_version for turn in rollout.closed.turns] == [0, 1, 2]
    assert gateway.load_weights(str(tmp_path), version=9) == 9


def test_weights_that_cannot_be_loaded_leave_the_gateway_paused(
    serve: Callable[..., GatewayClient], tmp_path: Path
) -> None:
    gateway = serve()
    with pytest.raises(EngineError, match=r"no folder .*stays paused"):
        gateway.load_weights(str(tmp_path / "none"))
    assert gateway.status().paused
    assert not gateway.resume().paused
    fixed = serve(Fixed())
    with pytest.raises(ConfigError, match="Fixed cannot load weights"):
        fixed.load_weights(str(tmp_path))


def test_weights_wait_for_what_is_in_flight(serve: Callable[..., GatewayClient], tmp_path: Path) -> None:
    gateway = serve(Learns(lambda _: [5], latency_s=1.0))
    opened = gateway.open()
    with ThreadPoolExecutor() as threads:
        call = threads.submit(ask, opened.base_url, opened.api_key, [USER])
        until = time.monotonic() + 10
        while not gateway.status().in_flight:
            assert time.monotonic() < until
        asked = {"path": str(tmp_path), "drain_s": 0}
        answer = httpx.post(f"{gateway.url}/gymlink/weights", json=asked, headers={"Authorization": f"Bearer {SECRET}"})
        assert answer.status_code == 409
        assert "1 generations were still in flight" in answer.json()["error"]["message"]
        assert not gateway.status().paused
        assert gateway.load_weights(str(tmp_path)) == 1
        call.result(10)
    assert [turn.weight_version for turn in gateway.close_rollout(opened.rollout_id).turns] == [0]


def test_an_answer_while_paused_is_429_and_says_when_to_come_back(serve: Callable[..., GatewayClient]) -> None:
    gateway = serve(gateway={"pause_hold_s": 0.05})
    opened = gateway.open()
    gateway.pause()
    answer = httpx.post(
        f"{opened.base_url}/chat/completions",
        json={"messages": [USER]},
        headers={"Authorization": f"Bearer {opened.api_key}"},
    )
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    gateway.resume()
    ask(opened.base_url, opened.api_key, [USER])
    assert len(gateway.close_rollout(opened.rollout_id).turns) == 1


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/collect", {"rows": [{}]}, "No Gym runs here"),
        ("/collect", {"rows": []}, "rows"),
        ("/collect", {"rows": [{}], "sample": 2}, "sample"),
        ("/rollouts", {"sampling": {"temperature": -1}}, "temperature"),
        ("/rollouts", {"sampling": {"seed": 1}}, "seed"),
        ("/rollouts", {"deadline_s": 0}, "deadline_s"),
        ("/resume", {"weight_version": "new"}, "weight_version"),
        ("/weights", {}, "path"),
        ("/pause", b"nonsense", "not JSON"),
        ("/pause", b"[1]", "object"),
    ],
)
def test_what_is_asked_wrongly_is_named(serve: Callable[..., GatewayClient], path: str, body: Any, said: str) -> None:
    gateway = serve()
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = httpx.post(f"{gateway.url}/gymlink{path}", headers={"Authorization": f"Bearer {SECRET}"}, **content)
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]


def test_a_last_turn_that_there_is_not_is_refused(serve: Callable[..., GatewayClient]) -> None:
    gateway = serve()
    opened = gateway.open()
    ask(opened.base_url, opened.api_key, [USER])
    with pytest.raises(ConfigError, match="has 1 turns"):
        gateway.close_rollout(opened.rollout_id, last_turn=3)
    assert len(gateway.close_rollout(opened.rollout_id).turns) == 1  # it is still there


def test_a_gateway_that_is_not_there_is_said() -> None:
    with GatewayClient("http://127.0.0.1:1", SECRET) as nobody, pytest.raises(GatewayError, match="cannot be reached"):
        nobody.status()


def test_the_agent_on_the_page_is_recorded(
    serve: Callable[..., GatewayClient], capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = serve()
    (block,) = (block for block in BLOCKS if block.page.name == "own-trainer.md" and "import OpenAI" in block.text)
    code = block.text.replace("http://127.0.0.1:8000", gateway.url).replace('"secret"', repr(SECRET))
    exec(compile(code, str(block), "exec"), {})
    assert gateway.status().sampled_tokens == 10
    assert capsys.readouterr().out.startswith("(")


def test_prometheus_reads_the_figures(serve: Callable[..., GatewayClient]) -> None:
    gateway = serve()
    with gateway.rollout() as rollout:
        ask(rollout.base_url, rollout.api_key, [USER])
        ask(rollout.base_url, rollout.api_key, [USER, {"role": "assistant", "content": "never said"}, MORE])
    answer = httpx.get(f"{gateway.url}/metrics", headers={"Authorization": f"Bearer {SECRET}"})
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    figures = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert rollout.closed is not None
    assert figures["gymlink_sampled_tokens_total", "rollout"] == rollout.closed.sampled_tokens
    assert figures["gymlink_prefix_breaks_total", "edited"] == 1
    assert figures["gymlink_prefix_breaks_total", "compacted"] == 0
    assert (figures["gymlink_turns_total",], figures["gymlink_requests_total",]) == (2, 2)
    assert figures["gymlink_open_rollouts",] == 0


def test_many_agents_at_a_time(serve: Callable[..., GatewayClient]) -> None:
    gateway = serve()

    def play(number: int) -> int:
        with gateway.rollout() as rollout:
            said = ask(rollout.base_url, rollout.api_key, [{"role": "user", "content": f"hi {number}"}])
            ask(rollout.base_url, rollout.api_key, [{"role": "user", "content": f"hi {number}"}, said, MORE])
        assert rollout.closed is not None
        return rollout.closed.sampled_tokens

    with ThreadPoolExecutor(8) as threads:
        sampled = sum(threads.map(play, range(16)))
    assert gateway.status().sampled_tokens == sampled


def test_rows_wait_for_gym_and_the_status_says_so(tokenizer: Any, tmp_path: Path) -> None:
    """The gateway answers before Gym is up: a trainer that comes early is told, and told again while Gym stops."""
    settings = PolicySettings()
    session = Session(
        settings,
        tokenizer=tokenizer,
        engine=Learns(lambda _: [1]),
        sampling=Sampling(),
        run_dir=tmp_path,
        secret=SECRET,
        routes=lambda session: Control(session, settings, collects=True).routes,
    )
    with session, GatewayClient(session.url, SECRET) as gateway:
        session._up = False
        assert not gateway.status().ready
        with pytest.raises(GatewayError, match="NeMo Gym is not up"):
            gateway.collect([{"responses_create_params": {"input": "hi"}}])
        with pytest.raises(GatewayError, match="not ready within 0"):
            gateway.wait(timeout_s=0)
    with pytest.raises(ConfigError, match="write it whole"):
        GatewayClient("127.0.0.1:8000", SECRET)
