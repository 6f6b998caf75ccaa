# SPDX-License-Identifier: Apache-2.0
"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

from ..conversation import Answer

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = Counter(
            "masquant_requests",
            "Chat completions by status; 499: the client left",
            ["status"],
            registry=self.registry,
        )
        self.admitted = Gauge("masquant_requests_admitted", "Chat completions in progress", registry=self.registry)
        self.running = Gauge("masquant_answers_running", "Answers being written", ["model"], registry=self.registry)
        self.prompt_tokens = Counter(
            "masquant_prompt_tokens", "Tokens read, media included", ["model"], registry=self.registry
        )
        self.completion_tokens = Counter(
            "masquant_completion_tokens", "Tokens written", ["model"], registry=self.registry
        )
        self.wait_seconds = Histogram(
            "masquant_wait_seconds", "Wait for a turn", ["model"], buckets=_SECONDS, registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "masquant_first_token_seconds",
            "Start to first token",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.decode_seconds = Histogram(
            "masquant_decode_seconds", "First to last token", ["model"], buckets=_SECONDS, registry=self.registry
        )

    def answered(self, model: str, answer: Answer) -> None:
        """Count an answer that ended, for whatever reason."""
        self.prompt_tokens.labels(model).inc(answer.prompt_tokens)
        self.completion_tokens.labels(model).inc(answer.completion_tokens)
        if answer.completion_tokens:
            self.first_token_seconds.labels(model).observe(answer.first_token_seconds)
            self.decode_seconds.labels(model).observe(answer.decode_seconds)
