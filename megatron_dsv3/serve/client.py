"""Requests to a server with OpenAI's interface: is it ready, and what does it answer."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

QUESTION = "What is 17 * 24?"
_SECONDS_TO_ANSWER = 600.0
_SECONDS_TO_PROBE = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request."""

    reasoning: str | None
    content: str | None
    num_tokens: int
    """Of reasoning and answer together."""
    seconds: float
    finish_reason: str

    @property
    def tokens_per_second(self) -> float:
        """Of this one request, prompt included: far below what many at once get."""
        return self.num_tokens / self.seconds


def is_ready(url: str) -> bool:
    """Whether the server answers and has loaded its model."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=_SECONDS_TO_PROBE) as response:
            return bool(response.status == http.client.OK)
    except (OSError, http.client.HTTPException):
        return False


def ask(
    url: str, *, question: str = QUESTION, max_tokens: int = 256, api_key: str | None = None
) -> Answer:
    """One question to the model that the server names first, answered greedily.

    Args:
        url: Of the server, with or without /v1.
        question: What a user says.
        max_tokens: Longest reasoning and answer together.
        api_key: What the server asks for.

    Raises:
        ValueError: No server there, it refused, or its answer is none.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url}: expected http://HOST:PORT")
    url = url.rstrip("/").removesuffix("/v1")
    models = _call(f"{url}/v1/models", None, api_key)
    try:
        name = models["data"][0]["id"]
        longest = models["data"][0].get("max_model_len") or 2 * max_tokens
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{url}/v1/models: expected a list of models, got {models}") from None
    request = {
        "model": name,
        "messages": [{"role": "user", "content": question}],
        # vLLM refuses more than the model takes; half of that leaves room for the question.
        "max_tokens": min(max_tokens, longest // 2),
        "temperature": 0,
    }
    start = time.perf_counter()
    response = _call(f"{url}/v1/chat/completions", request, api_key)
    seconds = time.perf_counter() - start
    try:
        [choice] = response["choices"]
        message = choice["message"]
        answer = Answer(
            # reasoning_content in older versions of vLLM.
            reasoning=message.get("reasoning") or message.get("reasoning_content"),
            content=message.get("content"),
            num_tokens=response["usage"]["completion_tokens"],
            seconds=seconds,
            finish_reason=choice["finish_reason"],
        )
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{url}: expected a chat completion, got {response}") from None
    if not answer.num_tokens or not (answer.reasoning or answer.content):
        raise ValueError(f"{url}: the answer to {question!r} is empty")
    return answer


def _call(url: str, content: Mapping[str, Any] | None, api_key: str | None) -> Any:
    """GET without content, else POST of it as JSON; the JSON that comes back."""
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    body = None if content is None else json.dumps(content).encode()
    try:
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request, timeout=_SECONDS_TO_ANSWER) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode(errors="replace").strip()
        way_out = "; give its key with --api-key" if error.code == http.client.UNAUTHORIZED else ""
        raise ValueError(f"{url}: the server answered {error.code}: {said}{way_out}") from None
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{url}: no answer ({error}); does the server run there?") from None
    except ValueError as error:
        raise ValueError(f"{url}: not a server of this kind ({error})") from None
