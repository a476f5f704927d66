"""Language models that explain latents and answer questions about them: on a server, or local.

A judge has a `name`, an `identity` (all that its answers depend on), `advance` (called with the
number of questions answered, for a progress bar), `check` (does it answer?), `fits` (can it read a
prompt?), `write` (a text for each prompt) and `answer` (probabilities for each question).
The last two take a second `attempt`, which may come out differently.
"""

import hashlib
import json
import math
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch
from jaxtyping import Float
from tenacity import RetryCallState

from groupsae.files.atomic import explain_write_errors
from groupsae.lm.context import context_of
from groupsae.lm.load import FrozenLM
from groupsae.runtime.errors import UserError
from groupsae.runtime.retry import is_transient, one_line, retrying
from groupsae.runtime.secrets import hide, redacted

BATCH = 5  # texts in a request, where the server gives no probabilities
WORDS = 60  # tokens of a local model's explanation
TOGETHER = 8  # prompts that a local model reads at once
CHARACTERS = 3.5  # of a token, about; where a server does not count them
Answers = Float[np.ndarray, "question option"]


class Question(NamedTuple):
    """A question about one text, with the words that may answer it."""

    task: str
    text: str
    options: tuple[str, ...] = ("yes", "no")

    @property
    def prompt(self) -> str:
        """Return it as one request."""
        *some, last = self.options
        words = f"{', '.join(some)} or {last}"
        return f"{self.task}\n\nText:\n{self.text}\n\nAnswer with one word: {words}.\nAnswer:"


class Ledger:
    """Every answer that was ever given, in a file: nothing is paid for twice.

    A line for each answer is written as soon as it is there. A kill truncates the last line at
    most.

    Attributes:
        file: the file.
        tokens: tokens read and written for all of them, by judge.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.tokens = file, dict[str, list[int]]()
        self._answers: dict[str, Any] = {}
        self._lock = threading.Lock()
        if file.exists():
            text = file.read_bytes()
            complete = text[: text.rfind(b"\n") + 1]
            for line in complete.splitlines():
                try:
                    row = json.loads(line)
                    self._take(row["key"], row["judge"], row["answer"], row["tokens"])
                except (ValueError, KeyError, TypeError):  # asked for again
                    continue
            if len(complete) < len(text):
                with explain_write_errors(file), file.open("ab") as handle:
                    handle.truncate(len(complete))

    @staticmethod
    def key(*parts: Any) -> str:
        """Return the hash of a request."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Any:
        """Return an answer; None if it was never given."""
        return self._answers.get(key)

    def add(self, key: str, judge: str, answer: Any, tokens: Sequence[int] = (0, 0)) -> None:
        """Keep an answer, and what it cost: tokens read and written."""
        line = json.dumps({"key": key, "judge": judge, "answer": answer, "tokens": tokens})
        with self._lock, explain_write_errors(self.file, "interpret a copy of the run"):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as handle:
                handle.write(redacted(line) + "\n")
            self._take(key, judge, answer, tokens)

    def _take(self, key: str, judge: str, answer: Any, tokens: Sequence[int]) -> None:
        self._answers[key] = answer
        spent = self.tokens.setdefault(judge, [0, 0])
        spent[:] = (a + int(b) for a, b in zip(spent, tokens, strict=True))

    def __len__(self) -> int:
        return len(self._answers)


# ---- on a server --------------------------------------------------------------------------


class _Malformed(Exception):
    """A reply that is no chat completion: truncated, empty, an error page."""


class Endpoint:
    """A model on a server that speaks OpenAI's chat completions: vLLM, llama.cpp, a company's.

    Args:
        ledger: answers of earlier starts, and of this one.
        report: prints a line: a request failed and is tried again.
        url: address up to `/v1`.
        model: name of the model there.
        key_variable: name of the environment variable with the key; None: no key is sent.
        seed: seed of every request.
        parallel: requests at the same time.
        timeout: seconds without a sign of the server after which a request has failed.
        retries: further tries of a request that failed.
        answer_tokens: most tokens of an explanation.
        most_tokens: tokens, read and written, after which it stops; earlier starts count.
        most_cost: the same in the unit of `price`; None: no limit.
        price: of a million tokens read, and written.
        body: further keys of each request; None removes one, such as `seed`.

    Raises:
        UserError: a value is missing, or the environment variable is not set.
    """

    def __init__(
        self,
        ledger: Ledger,
        report: Callable[[str], object],
        *,
        url: str,
        model: str | None,
        key_variable: str | None = None,
        seed: int = 0,
        parallel: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        answer_tokens: int = 300,
        most_tokens: int = 20_000_000,
        most_cost: float | None = None,
        price: Sequence[float] = (0.0, 0.0),
        body: Mapping[str, Any] | None = None,
    ) -> None:
        if not model:
            raise UserError(
                "interpretation.endpoint.model has no default: give the name of a model that "
                f"{url} serves."
            )
        if not url.startswith(("http://", "https://")):
            raise UserError(
                f"interpretation.endpoint.url is {url!r}: give an address such as "
                "http://localhost:8000/v1."
            )
        if most_cost is not None and not any(price):
            raise UserError(
                "interpretation.endpoint.most_cost needs the price of a million tokens read and "
                "written: interpretation.endpoint.price=[<read>,<written>]."
            )
        self.ledger, self.report = ledger, report
        self.advance: Callable[[int], object] = int
        self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable
        self.name = f"endpoint {model}"
        self.seed, self.parallel, self.retries = seed, parallel, retries
        self.answer_tokens, self.most_tokens = answer_tokens, most_tokens
        self.most_cost = most_cost
        self.price, self.body = list(price), dict(body or {})
        self.identity: dict[str, Any] = {
            "kind": "endpoint",
            "url": redacted(self.url),
            "model": model,
            "body": self.body,
        }
        headers = {}
        if key_variable is not None:
            headers["Authorization"] = f"Bearer {_key(key_variable)}"
        self._client = httpx.Client(timeout=timeout, headers=headers)
        self._stop = threading.Event()
        self._lost = [0, 0]  # tokens of replies that could not be used
        self._gives_probabilities: bool | None = None

    def check(self) -> None:
        """Ask one question, before hours of work.

        Raises:
            UserError: the server does not answer, or refuses access.
        """
        self._gives_probabilities = self._probe(Question("Is this text empty?", "No, it is not."))

    def fits(self, prompt: str) -> bool:
        """Return True: the server knows."""
        return True

    def write(self, prompts: Sequence[str], attempt: int = 0) -> list[str]:
        """Return the model's answers, empty where there was none."""
        replies = self._each(
            lambda prompt: self._ask(prompt, attempt, {"max_tokens": self.answer_tokens}), prompts
        )
        return ["" if reply is None else str(reply["text"]) for reply in replies]

    def answer(self, questions: Sequence[Question], attempt: int = 0) -> Answers:
        """Return the probabilities of the options, by single tokens where the server gives them.

        Elsewhere five texts are asked about at once, and the probabilities are 0 and 1.
        """
        if not questions:
            return np.empty((0, 0))
        if self._gives_probabilities is None:
            self._gives_probabilities = self._probe(questions[0])
        if self._gives_probabilities:
            found = self._each(lambda q: self._probabilities(q, attempt), questions)
            return np.array(found)
        batches = [
            list(same)[i : i + BATCH]
            for _, group in groupby(questions, lambda q: (q.task, q.options))
            for same in [list(group)]
            for i in range(0, len(same), BATCH)
        ]
        lists = self._each(lambda batch: self._listed(batch, attempt), batches, len)
        return np.array([row for rows in lists for row in rows])

    def _probe(self, question: Question) -> bool:
        """Ask one question; return whether the server gives probabilities."""
        try:
            reply = self._ask(question.prompt, 0, _ONE_TOKEN)
        except _Refused as error:
            if error.status not in (400, 404, 422, 501):
                raise
            reply = self._ask(question.prompt, 0, {"max_tokens": 8})  # without logprobs
        if reply is None:
            raise UserError(
                f"{self.url} sends no chat completions: interpretation.endpoint.url is the "
                "address of an OpenAI-compatible server up to /v1."
            )
        return reply["top"] is not None

    def _probabilities(self, question: Question, attempt: int) -> list[float]:
        reply = self._ask(question.prompt, attempt, _ONE_TOKEN)
        found = dict.fromkeys(question.options, 0.0)
        for token, logprob in (reply or {}).get("top") or []:
            word = re.sub(r"\W", "", token).lower()
            if word in found:
                found[word] += math.exp(min(logprob, 0.0))
        total = sum(found.values())
        return [p / total if total > 0 else math.nan for p in found.values()]

    def _listed(self, batch: Sequence[Question], attempt: int) -> list[list[float]]:
        options = batch[0].options
        texts = [f"Text {i}:\n{question.text}" for i, question in enumerate(batch, 1)]
        words = " or ".join(json.dumps(option) for option in options)
        prompt = "\n\n".join([batch[0].task, *texts])
        prompt += f"\n\nAnswer for each text with {words}: a JSON list of {len(batch)}, no more."
        reply = self._ask(prompt, attempt, {"max_tokens": max(100, 12 * len(batch))})
        answers = _json_list("" if reply is None else reply["text"])
        if len(answers) != len(batch) or not set(answers) <= set(options):
            return [[math.nan] * len(options) for _ in batch]
        return [[float(option == answer) for option in options] for answer in answers]

    def _ask(self, prompt: str, attempt: int, more: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return text and probabilities of the first token; None if no reply can be used."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "seed": self.seed + attempt,
            **more,
            **self.body,
        }
        body = {name: value for name, value in body.items() if value is not None}
        key = self.ledger.key(self.identity["url"], body)
        known: dict[str, Any] | None = self.ledger.get(key)
        if known is not None:
            return known
        self._check_cap()
        try:
            for attempt_of_request in retrying(
                self.retries, self._may_pass, self._announce, self._pause
            ):
                with attempt_of_request:
                    answer, tokens = self._post(body, prompt)
        except _Malformed:
            return None
        except httpx.HTTPStatusError as error:
            raise self._refused(error) from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise UserError(
                f"{self.url} does not answer ({one_line(error)}): check "
                f"interpretation.endpoint.url and that the server runs. {self._kept()}"
            ) from error
        self.ledger.add(key, self.name, answer, tokens)
        return answer

    def _post(self, body: Mapping[str, Any], prompt: str) -> tuple[dict[str, Any], list[int]]:
        response = self._client.post(f"{self.url}/chat/completions", json=body)
        response.raise_for_status()
        try:
            reply = response.json()
            choice = reply["choices"][0]
            text = choice["message"].get("content") or ""
            top = _first_token(choice.get("logprobs"))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self._lost[0] += round(len(prompt) / CHARACTERS)  # it may have been charged
            raise _Malformed(f"no chat completion but {response.text[:80]!r}") from error
        usage = reply.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        tokens = [
            usage[name] if isinstance(usage.get(name), int) else round(len(said) / CHARACTERS)
            for name, said in (("prompt_tokens", prompt), ("completion_tokens", str(text)))
        ]
        return {"text": str(text), "top": top}, tokens

    def _may_pass(self, error: BaseException) -> bool:
        return not self._stop.is_set() and (isinstance(error, _Malformed) or is_transient(error))

    def _pause(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _announce(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        pause = state.next_action.sleep if state.next_action else 0.0
        if error is not None and (pause > 5 or state.attempt_number == 1):
            text = f"{self.url}: {one_line(error)}; trying again in {pause:.0f} s"
            self.report(redacted(text))

    def _refused(self, error: httpx.HTTPStatusError) -> UserError:
        status, said = error.response.status_code, redacted(" ".join(error.response.text.split()))
        if status in (401, 403):
            key = (
                "send a key with interpretation.endpoint.key_variable=<environment variable>"
                if self.key_variable is None
                else f"check the key in the environment variable {self.key_variable}"
            )
            return UserError(f"{self.url} refuses access ({status}): {key}. {self._kept()}")
        return _Refused(
            status,
            f"{self.url} refuses the request ({status}): {said[:200] or 'no reason given'}. Keys "
            "of the request are changed or left out by interpretation.endpoint.body. "
            f"{self._kept()}",
        )

    def _check_cap(self) -> None:
        recorded = self.ledger.tokens.get(self.name, [0, 0])
        read, written = (a + b for a, b in zip(recorded, self._lost, strict=True))
        if read + written >= self.most_tokens:
            raise UserError(
                f"the judge has read and written {read + written:,} tokens, as many as "
                f"interpretation.endpoint.most_tokens allows: raise it to continue. {self._kept()}"
            )
        cost = (read * self.price[0] + written * self.price[1]) / 1e6
        if self.most_cost is not None and cost >= self.most_cost:
            raise UserError(
                f"the judge has cost {cost:.2f}, as much as interpretation.endpoint.most_cost "
                f"allows: raise it to continue. {self._kept()}"
            )

    def _kept(self) -> str:
        return f"The {len(self.ledger):,} answers so far are kept; the same command continues."

    def _each(
        self,
        work: Callable[[Any], Any],
        items: Sequence[Any],
        size: Callable[[Any], int] | None = None,
    ) -> list[Any]:
        """Return the result for each item; the first error stops them all."""
        results: list[Any] = [None] * len(items)
        done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

        self._stop.clear()

        def one(place: int) -> None:
            if self._stop.is_set():
                return
            try:
                done.put((place, work(items[place]), None))
            except BaseException as error:
                self._stop.set()
                done.put((place, None, error))

        pool = ThreadPoolExecutor(self.parallel)
        try:
            for place in range(len(items)):
                pool.submit(one, place)
            for _ in items:
                place, results[place], error = done.get()
                if error is not None:
                    raise error
                self.advance(size(items[place]) if size else 1)
        except BaseException:
            self._stop.set()  # a signal, too: pauses between tries end
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return results


class _Refused(UserError):
    """The server refuses a request as such."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


_ONE_TOKEN = {"max_tokens": 1, "logprobs": True, "top_logprobs": 5}


def _key(variable: str) -> str:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise UserError(  # does not show it: it may be the key itself
            "interpretation.endpoint.key_variable must be the name of an environment variable in "
            "capitals, such as OPENAI_API_KEY; the key itself belongs in that variable only."
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {variable} is not set, from which "
            "interpretation.endpoint.key_variable takes the server's key."
        )
    hide(key)
    return key


def _first_token(logprobs: Any) -> list[tuple[str, float]] | None:
    """Return the most probable first tokens; None if the server does not give them."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not content:
        return None
    found = content[0].get("top_logprobs") or [content[0]]
    return [(str(each["token"]), float(each["logprob"])) for each in found]


def _json_list(text: str) -> list[str]:
    """Return the last list of words in a text; empty if there is none."""
    for found in reversed(re.findall(r"\[[^\[\]]*\]", text)):
        try:
            values = json.loads(found)
        except ValueError:
            continue
        return [str(value).strip().lower() for value in values]
    return []


# ---- on this machine ----------------------------------------------------------------------


class Local:
    """A causal model of Hugging Face on this machine: the logits of its next token.

    Args:
        ledger: answers of earlier starts, and of this one.
        lm: the model, not loaded yet.
        device: where it runs.
        seed: of the second attempt of an explanation, which is drawn.

    Raises:
        UserError: the model is not a causal one.
    """

    def __init__(
        self,
        ledger: Ledger,
        lm: FrozenLM,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        self.ledger, self.seed = ledger, seed
        self.advance: Callable[[int], object] = int
        self.name = f"hf {lm.name}"
        self.identity: dict[str, Any] = {
            "kind": "hf",
            "model": lm.name,
            "weights": lm.fingerprint(),
        }
        if lm.stack != "decoder":
            raise self._not_causal()
        self.lm, self.device, self.tokenizer = lm, device, lm.tokenizer()
        self.most = context_of(lm.config.get_text_config())

    @cached_property
    def model(self) -> Any:
        """Return the model; it is loaded when the first question has no known answer."""
        model = self.lm.load_plain(self.device)
        if not model.can_generate():
            raise self._not_causal()
        return model

    def _not_causal(self) -> UserError:
        return UserError(
            f"interpretation.hf.name is {self.identity['model']!r}, which does not continue text: "
            "use a causal language model."
        )

    def check(self) -> None:
        """Do nothing: its files were read when it was made, and it is loaded when needed."""

    def fits(self, prompt: str) -> bool:
        """Return whether the model can read a prompt and write an explanation."""
        return self.most is None or len(self._ids(prompt)) + WORDS <= self.most

    def write(self, prompts: Sequence[str], attempt: int = 0) -> list[str]:
        """Return how the model continues each prompt: the most probable, or a drawn way."""
        return [str(self._known(prompt, attempt, self._written)) for prompt in prompts]

    def answer(self, questions: Sequence[Question], attempt: int = 0) -> Answers:
        """Return the probability of each option's first token against those of the others."""
        found: list[Any] = [None] * len(questions)
        keys = [self._key([q.prompt, q.options]) for q in questions]
        left = []
        for i, key in enumerate(keys):
            found[i] = self.ledger.get(key)
            if found[i] is None:
                left.append(i)
            else:
                self.advance(1)
        ids = {i: self._ids(questions[i].prompt) for i in left}
        left.sort(key=lambda i: len(ids[i]))
        for first in range(0, len(left), TOGETHER):
            chosen = left[first : first + TOGETHER]
            for i, logits in zip(chosen, self._next([ids[i] for i in chosen]), strict=True):
                found[i] = self._shares(logits, questions[i].options)
                self.ledger.add(keys[i], self.name, found[i])
            self.advance(len(chosen))
        return np.array(found, float)

    def _known(self, prompt: str, attempt: int, make: Callable[[str, int], Any]) -> Any:
        key = self._key([prompt, attempt, self.seed])
        known = self.ledger.get(key)
        if known is None:
            known = make(prompt, attempt)
            self.ledger.add(key, self.name, known)
        self.advance(1)
        return known

    def _key(self, parts: Any) -> str:
        return self.ledger.key(self.identity, parts)

    def _ids(self, prompt: str) -> list[int]:
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            prompt = str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            )
            return list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer(prompt)["input_ids"])

    @torch.no_grad()
    def _written(self, prompt: str, attempt: int) -> str:
        ids = torch.tensor([self._ids(prompt)], device=self.device)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=WORDS,
                do_sample=attempt > 0,
                pad_token_id=self.tokenizer.eos_token_id or 0,
            )
        text = str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        # without a chat's turns it continues the prompt's last line
        return text if self.tokenizer.chat_template else prompt.splitlines()[-1] + text.lstrip()

    @torch.no_grad()
    def _next(self, prompts: Sequence[list[int]]) -> Iterator[torch.Tensor | None]:
        """Yield the logits of each prompt's next token; None if it is too long."""
        fits = [ids for ids in prompts if self.most is None or len(ids) <= self.most]
        last = torch.tensor([len(ids) - 1 for ids in fits])
        logits = torch.empty(0)
        if fits:
            longest = int(last.max()) + 1
            batch, mask = torch.zeros(2, len(fits), longest, dtype=torch.int64)
            for row, ids in enumerate(fits):  # padded behind, where no token looks
                batch[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
            out = self.model(
                batch.to(self.device), attention_mask=mask.to(self.device), use_cache=False
            )
            logits = out.logits[torch.arange(len(fits)), last.to(out.logits.device)].float().cpu()
        rows = iter(logits)
        for ids in prompts:
            yield next(rows) if self.most is None or len(ids) <= self.most else None

    def _shares(self, logits: torch.Tensor | None, options: Sequence[str]) -> list[float]:
        first = []
        for option in options:
            forms = (option, f" {option}", option.capitalize(), f" {option.capitalize()}")
            encoded = [
                self.tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms
            ]
            first.append({ids[0] for ids in encoded if ids})
        own = [
            sorted(ids.difference(*(other for j, other in enumerate(first) if j != i)))
            for i, ids in enumerate(first)
        ]
        if logits is None or not all(own):
            return [math.nan] * len(options)
        scores = torch.stack([logits[ids].logsumexp(0) for ids in own])
        return [float(p) for p in scores.softmax(0)]


Judge = Endpoint | Local
