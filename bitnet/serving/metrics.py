"""What a server counts, for Prometheus."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
KNOWN: tuple[str, ...] = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/models",
    "/tokenize",
)
KNOWN += ("/detokenize", "/health", "/metrics", "/")


class Metrics:
    """One server's numbers."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = where = CollectorRegistry()
        self._answers = Counter(
            "bitnet_requests", "Requests by endpoint and status.", ["path", "status"], registry=where
        )
        self.failures = Counter("bitnet_failures", "Errors of the server itself.", registry=where)
        self.prompt = Counter("bitnet_prompt_tokens", "Tokens of prompts.", registry=where)
        self.reused = Counter(
            "bitnet_reused_prompt_tokens", "Tokens of prompts that were known already.", registry=where
        )
        self.generated = Counter("bitnet_generated_tokens", "Tokens generated.", registry=where)
        self.first = Histogram(
            "bitnet_first_token_seconds", "From a request to its first text.", buckets=_SECONDS, registry=where
        )
        self.each = Histogram("bitnet_token_seconds", "Between tokens.", buckets=_SECONDS, registry=where)
        self._running = Gauge("bitnet_running", "Sequences being generated.", registry=where)
        self._waiting = Gauge("bitnet_waiting", "Sequences in the queue.", registry=where)

    def answered(self, path: str, status: int) -> None:
        """Count an answer; status 0 is a client that went away."""
        self._answers.labels(path if path in KNOWN else "other", str(status)).inc()

    def text(self, running: int, waiting: int) -> bytes:
        """All of it."""
        self._running.set(running)
        self._waiting.set(waiting)
        return generate_latest(self._registry)
