"""The figures of a gateway that runs for long, for Prometheus: read off when they are asked for, and kept nowhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gymlink.gateway import PolicyService
from gymlink.types import ForkCause, Turn

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class GatewayMetrics(Collector):
    """All figures of one gateway. Names begin with `gymlink_`; tokens are counted at the engine."""

    def __init__(self, service: PolicyService) -> None:
        self._service = service
        self._breaks: Counter[ForkCause] = Counter()
        self._turns = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def count(self, turns: Iterable[Turn]) -> None:
        """Count the turns of a rollout that has ended."""
        for turn in turns:
            self._turns += 1
            if turn.cause is not None:
                self._breaks[turn.cause] += 1

    def text(self) -> bytes:
        """What a scrape gets."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client`: it calls this for each scrape."""
        service, totals = self._service, self._service.totals
        yield CounterMetricFamily("gymlink_requests", "Calls of the policy.", totals.requests)
        tokens = CounterMetricFamily("gymlink_sampled_tokens", "Tokens sampled, by whose they are.", labels=["owner"])
        tokens.add_metric(["rollout"], totals.attributed_tokens)
        tokens.add_metric(["nobody"], totals.unattributed_tokens)
        tokens.add_metric(["ended_rollout"], totals.abandoned_tokens)
        yield tokens
        yield CounterMetricFamily("gymlink_turns", "Turns of rollouts that have ended.", self._turns)
        breaks = CounterMetricFamily(
            "gymlink_prefix_breaks", "Turns of them that did not extend what was sampled, by cause.", labels=["cause"]
        )
        for cause in ForkCause:
            breaks.add_metric([cause.value], self._breaks[cause])
        yield breaks
        yield CounterMetricFamily(
            "gymlink_encoder_differences",
            "Texts that the faster encoder wrote otherwise than the tokenizer, which encodes alone from then on.",
            service.encoder_differences,
        )
        yield GaugeMetricFamily("gymlink_open_rollouts", "Rollouts that are open.", len(service.rollouts))
        yield GaugeMetricFamily("gymlink_in_flight", "Generations in flight.", service.in_flight)
        yield GaugeMetricFamily("gymlink_paused", "1 while no generation may begin.", int(service.paused))
        yield GaugeMetricFamily("gymlink_weight_version", "Version of the weights.", service.engine.weight_version)
