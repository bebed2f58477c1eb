"""Clients for language models that answer prompts: OpenAI-compatible APIs and local models, with usage counts."""

import hashlib
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from ...sae.files import read_json, write_json
from ...training.activations.hooked_model import next_token_loss
from ...training.activations.model import LanguageModel
from ...training.tokens import with_one_bos

# Status codes that are worth a retry.
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0


@dataclass
class LlmUsage:
    """Usage so far. Answers from the cache cost nothing and increase ``cached`` only."""

    requests: int = 0
    retries: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def entries(self) -> dict[str, int | float]:
        return asdict(self)


class Chat(ABC):
    """Language model that answers prompts; ``name`` identifies it."""

    name: str
    usage: LlmUsage

    @abstractmethod
    def answer(self, system: str, prompt: str) -> str:
        """Return the answer's text, unprocessed."""

    def loss(self, prompt: str, text: str) -> float | None:
        """Return the mean loss in nats of the tokens of a text behind a prompt; None if this model gives no losses."""
        return None

    @abstractmethod
    def require_ready(self) -> None:
        """Raise ``ValueError`` if the model is known to be unavailable."""

    @abstractmethod
    def close(self) -> None:
        """Release resources."""


class Endpoint(Chat):
    """Client of an OpenAI-compatible API, ``POST URL/chat/completions`` (OpenAI, vLLM, llama.cpp, Ollama).

    Requests are at least ``60 / requests_per_minute`` seconds apart. Transient failures (busy, timeout) are retried, each time
    after twice the wait, or after the server's ``Retry-After``.

    Args:
        key_env: Environment variable that holds the API key, if it is set.
        cache: Directory of answers by request, so that a repeated run sends no request.
        prices: Price per million tokens, of prompts and of answers.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_env: str = "OPENAI_API_KEY",
        cache: str | Path | None = None,
        requests_per_minute: int | float | None = None,
        retries: int = 4,
        timeout_seconds: float = 60.0,
        prices: tuple[float, float] = (0.0, 0.0),
        max_tokens: int = 400,
        sleep: Callable[[float], Any] = time.sleep,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--explainer: expected an address that begins with http:// or https://, got {url!r}.")
        if requests_per_minute is not None and requests_per_minute <= 0:
            raise ValueError(f"requests_per_minute: expected more than 0, got {requests_per_minute}.")
        self.url, self.name, self.retries, self.prices, self.max_tokens = url.rstrip("/"), model, retries, prices, max_tokens
        self.usage = LlmUsage()
        self.cache = None if cache is None else Path(cache)
        self._apart = 0.0 if requests_per_minute is None else 60.0 / requests_per_minute
        self._next, self._sleep = 0.0, sleep
        key = os.environ.get(key_env)
        self._key_env = key_env if key else f"{key_env}, which is not set"
        if not key and key_env != "OPENAI_API_KEY":
            raise ValueError(f"--key-env: expected an environment variable that holds a key, got {key_env!r}, not set.")
        self._client = httpx.Client(timeout=timeout_seconds, headers={"Authorization": f"Bearer {key}"} if key else {})

    def answer(self, system: str, prompt: str) -> str:
        """Return the answer's text, or an empty one if the reply is malformed.

        Raises:
            ValueError: If the server cannot be reached or refuses.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        body = {"model": self.name, "messages": messages, "temperature": 0.0, "max_tokens": self.max_tokens}
        file = self._file(body)
        if file is not None and file.exists():
            self.usage.cached += 1
            return str(read_json(file)["answer"])
        reply = self._post(body)
        text = _text(reply)
        self._count(reply)
        if file is not None and text:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"request": body, "answer": text}, sealed=True)
        return text

    def require_ready(self) -> None:
        """Request the list of models, which costs nothing, to check that the server is up and accepts the key.

        Servers without such a list pass, and so does one with cached answers, since every answer may be cached.

        Raises:
            ValueError: If the server does not respond or refuses the key.
        """
        if self.cache is not None and any(self.cache.glob("*.json")):
            return
        response = self._asked("GET", "models")
        if response.status_code in (401, 403):
            raise ValueError(
                f"--explainer: {self.url} rejects the API key (status {response.status_code}: {response.text[:200]}). It is "
                f"read from the environment variable {self._key_env}; --key-env names another."
            )

    def close(self) -> None:
        self._client.close()

    def _file(self, body: dict[str, Any]) -> Path | None:
        if self.cache is None:
            return None
        asked = json.dumps([self.url, body], sort_keys=True)
        return self.cache / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"

    def _post(self, body: dict[str, Any]) -> Any:
        response = self._asked("POST", "chat/completions", body)
        if response.status_code != 200:
            problem = f"status {response.status_code}: {response.text[:200]}"
            raise ValueError(f"--explainer: {self.url} rejects the request ({problem}). Check address, model name and key.")
        return _json(response)

    def _asked(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """Return the server's response, with retries of transient failures."""
        wait, problem = FIRST_WAIT_SECONDS, ""
        for attempt in range(self.retries + 1):
            if body is not None:
                self._keep_apart()
                self.usage.requests += 1
                self.usage.retries += attempt > 0
            try:
                response = self._client.request(method, f"{self.url}/{path}", json=body)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                problem, asked = f"{type(error).__name__}: {error}", None
            else:
                if body is None or response.status_code not in TRANSIENT:
                    return response
                problem, asked = f"status {response.status_code}: {response.text[:200]}", response.headers.get("Retry-After")
            if attempt < self.retries:
                self._sleep(min(LONGEST_WAIT_SECONDS, _seconds(asked, wait)))
                wait *= 2
        raise ValueError(
            f"--explainer: {self.url} could not be reached in {self.retries + 1} attempts ({problem}). Check that the server "
            "runs. Earlier answers are kept, and the same command continues."
        )

    def _keep_apart(self) -> None:
        now = time.monotonic()
        if now < self._next:
            self._sleep(self._next - now)
        self._next = max(now, self._next) + self._apart

    def _count(self, reply: Any) -> None:
        used = reply.get("usage") if isinstance(reply, dict) else None
        for name, price in zip(("prompt_tokens", "completion_tokens"), self.prices, strict=True):
            tokens = (used or {}).get(name) or 0
            setattr(self.usage, name, getattr(self.usage, name) + tokens)
            self.usage.cost += tokens * price / 1e6


class LocalChat(Chat):
    """Local transformers model with greedy decoding. Without a chat template, both texts are concatenated."""

    def __init__(self, model: LanguageModel, max_tokens: int = 100):
        self.model, self.name, self.max_tokens, self.usage = model, model.id, max_tokens, LlmUsage()

    @torch.no_grad()
    def answer(self, system: str, prompt: str) -> str:
        """Return the answer's text. A prompt too long for the model loses its beginning."""
        tokenizer, module = self.model.tokenizer, self.model.module
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": f"{system}\n\n{prompt}"}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = f"{system}\n\n{prompt}\n"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        longest = getattr(module.config, "max_position_embeddings", None) or ids.shape[1] + self.max_tokens
        answer_tokens = min(self.max_tokens, longest // 2)
        ids = ids[:, -(longest - answer_tokens) :].to(self.model.device)
        generate: Any = module.generate
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        out = generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=answer_tokens, do_sample=False, pad_token_id=pad_id
        )
        self.usage.requests += 1
        self.usage.prompt_tokens += ids.shape[1]
        self.usage.completion_tokens += out.shape[1] - ids.shape[1]
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    @torch.no_grad()
    def loss(self, prompt: str, text: str) -> float | None:
        """Return the mean loss of a text's tokens. A prompt too long for the model loses its beginning; None without a text."""
        tokenizer = self.model.tokenizer
        before, tokens = (tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in (prompt, text))
        longest = getattr(self.model.module.config, "max_position_embeddings", None) or len(before) + len(tokens) + 1
        tokens = tokens[: longest - 1]
        room = longest - len(tokens)
        ids = with_one_bos([*before[max(0, len(before) - room + 1) :], *tokens], tokenizer.bos_token_id)[-longest:]
        # The first token has nothing before it that predicts it.
        count = min(len(tokens), len(ids) - 1)
        if count < 1:
            return None
        token_ids = torch.tensor([ids], device=self.model.device)
        self.usage.requests += 1
        self.usage.prompt_tokens += len(ids)
        return float(next_token_loss(self.model.logits(token_ids), token_ids)[0, -count:].mean())

    def require_ready(self) -> None:
        pass

    def close(self) -> None:
        pass


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _text(reply: Any) -> str:
    try:
        text = reply["choices"][0]["message"]["content"]
    except (TypeError, KeyError, IndexError):
        return ""
    return text if isinstance(text, str) else ""


def _seconds(asked: str | None, otherwise: float) -> float:
    """Return the seconds that a server asks to wait; a date is ignored."""
    return float(asked) if asked and asked.replace(".", "", 1).isdigit() else otherwise
