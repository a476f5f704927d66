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
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch
from jaxtyping import Float
from tenacity import RetryCallState
from torch.nn.utils.rnn import pad_sequence

from groupsae.files.atomic import explain_write_errors
from groupsae.lm.context import context_of
from groupsae.lm.load import FrozenLM
from groupsae.runtime.errors import UserError
from groupsae.runtime.retry import is_transient, one_line, retrying
from groupsae.runtime.secrets import hide, redacted

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
        words = f"{', '.join(self.options[:-1])} or {self.options[-1]}"
        return f"{self.task}\n\nText:\n{self.text}\n\nAnswer with one word: {words}.\nAnswer:"


class Ledger:
    """Every answer that was ever given, in a file: nothing is paid for twice.

    A line for each answer is written at once; a kill truncates the last one at most.

    Attributes:
        file: the file.
        tokens: tokens read and written for all of them, by name of the judge.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.tokens = file, Counter[str]()
        self._answers: dict[str, Any] = {}
        self._lock = threading.Lock()
        for line in file.read_bytes().splitlines() if file.exists() else ():
            try:
                self._take(**json.loads(line))
            except (ValueError, TypeError):  # truncated: it is asked for again
                continue

    @staticmethod
    def key(*parts: Any) -> str:
        """Return the hash of a request."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Any:
        """Return an answer; None if it was never given."""
        return self._answers.get(key)

    def add(self, key: str, judge: str, answer: Any, tokens: int = 0) -> None:
        """Keep an answer, and the tokens that were read and written for it."""
        line = json.dumps({"key": key, "judge": judge, "answer": answer, "tokens": tokens})
        with self._lock, explain_write_errors(self.file, "interpret a copy of the run"):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as handle:
                handle.write(f"\n{redacted(line)}")  # a truncated line before it stays one line
            self._take(key, judge, answer, tokens)

    def _take(self, key: str, judge: str, answer: Any, tokens: int) -> None:
        self._answers[key] = answer
        self.tokens[judge] += tokens

    def __len__(self) -> int:
        return len(self._answers)


# ---- on a server --------------------------------------------------------------------------


class _Malformed(Exception):
    """A reply that is no chat completion: truncated, empty, an error page."""


class Endpoint:
    """A model on a server that speaks OpenAI's chat completions: vLLM, llama.cpp, a company's.

    The arguments are those of `interpretation.endpoint`, and

    Args:
        ledger: answers of earlier starts, and of this one.
        report: prints a line: a request failed and is tried again.
        seed: seed of every request.

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
        self.ledger, self.report = ledger, report
        self.advance: Callable[[int], object] = int
        self.url, self.key_variable, self.name = url.rstrip("/"), key_variable, f"endpoint {model}"
        self.parallel, self.retries = parallel, retries
        self.answer_tokens, self.most_tokens = answer_tokens, most_tokens
        body = dict(body or {})
        self.seed, self.body = seed, {"model": model, **body}
        self.identity: dict[str, Any] = {"kind": "endpoint", "url": redacted(self.url)}
        self.identity |= {"model": model, "body": body}
        key = {} if key_variable is None else {"Authorization": f"Bearer {_key(key_variable)}"}
        self._client = httpx.Client(timeout=timeout, headers=key)
        self._stop = threading.Event()
        self._lost = 0  # tokens of requests whose replies could not be used
        self._how: dict[str, Any] | None = None  # how an answer is asked for

    def check(self) -> None:
        """Ask one question, before hours of work.

        Raises:
            UserError: the server does not answer, or refuses access.
        """
        self._probe(Question("Is this text empty?", "No, it is not."))

    def fits(self, prompt: str) -> bool:
        """Return True: the server knows."""
        return True

    def write(self, prompts: Sequence[str], attempt: int = 0) -> list[str]:
        """Return the model's answers, empty where there was none."""
        how = {"max_tokens": self.answer_tokens}
        replies = self._each(lambda prompt: self._ask(prompt, attempt, how), prompts)
        return ["" if reply is None else str(reply["text"]) for reply in replies]

    def answer(self, questions: Sequence[Question], attempt: int = 0) -> Answers:
        """Return the probabilities of the options, by the first token where the server gives them.

        Elsewhere they are 0 and 1, by the word that is written.
        """
        if questions and self._how is None:
            self._probe(questions[0])
        return np.array(self._each(lambda q: self._shares(q, attempt), questions))

    def _probe(self, question: Question) -> None:
        """Ask one question, to learn whether the server gives probabilities."""
        key = self.ledger.key(self.identity, "refuses logprobs")
        refused = self.ledger.get(key)
        try:
            reply = self._ask(question.prompt, 0, _FEW_WORDS if refused else _ONE_TOKEN)
        except _Refused as error:
            if refused or error.status not in (400, 404, 422, 501):
                raise
            reply = self._ask(question.prompt, 0, _FEW_WORDS)
            self.ledger.add(key, self.name, error.status)
        if reply is None:
            raise UserError(
                f"{self.url} sends no chat completions: interpretation.endpoint.url is the "
                "address of an OpenAI-compatible server up to /v1."
            )
        self._how = _ONE_TOKEN if reply["top"] else {"max_tokens": self.answer_tokens}

    def _shares(self, question: Question, attempt: int) -> list[float]:
        reply = self._ask(question.prompt, attempt, self._how or {}) or {"text": "", "top": None}
        found = dict.fromkeys(question.options, 0.0)
        if reply["top"]:
            for token, logprob in reply["top"]:
                word = re.sub(r"\W", "", token).lower()
                if word in found:
                    found[word] += math.exp(min(logprob, 0.0))
        else:
            said = set(re.findall(r"\w+", reply["text"].lower())) & set(found)
            found |= dict.fromkeys(said, 1.0 if len(said) == 1 else 0.0)
        total = sum(found.values())
        return [p / total if total > 0 else math.nan for p in found.values()]

    def _ask(self, prompt: str, attempt: int, more: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return text and probabilities of the first token; None if no reply can be used."""
        body: dict[str, Any] = {
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
        spent = self.ledger.tokens.get(self.name, 0) + self._lost
        if spent >= self.most_tokens:
            raise UserError(
                f"the judge has read and written {spent:,} tokens, as many as "
                f"interpretation.endpoint.most_tokens allows: raise it to continue. {self._kept()}"
            )
        try:
            for one in retrying(self.retries, self._may_pass, self._announce, self._pause):
                with one:
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

    def _post(self, body: Mapping[str, Any], prompt: str) -> tuple[dict[str, Any], int]:
        """Return the answer, and the tokens that were read and written for it."""
        response = self._client.post(f"{self.url}/chat/completions", json=body)
        response.raise_for_status()
        try:
            reply = response.json()
            choice = reply["choices"][0]
            text = str(choice["message"].get("content") or "")
            top = _first_token(choice.get("logprobs"))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self._lost += round(len(prompt) / CHARACTERS)  # it may have been charged
            raise _Malformed(f"no chat completion but {response.text[:80]!r}") from error
        try:
            tokens = sum(
                int(reply["usage"][f"{each}_tokens"]) for each in ("prompt", "completion")
            )
        except (KeyError, TypeError, ValueError):  # it does not count them
            tokens = round((len(prompt) + len(text)) / CHARACTERS)
        return {"text": text, "top": top}, tokens

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
        status, text = error.response.status_code, redacted(" ".join(error.response.text.split()))
        if status in (401, 403):
            key = (
                "send a key with interpretation.endpoint.key_variable=<environment variable>"
                if self.key_variable is None
                else f"check the key in the environment variable {self.key_variable}"
            )
            return UserError(f"{self.url} refuses access ({status}): {key}. {self._kept()}")
        return _Refused(
            status,
            f"{self.url} refuses the request ({status}): {text[:200] or 'no reason given'}. Keys "
            "of the request are changed or left out by interpretation.endpoint.body. "
            f"{self._kept()}",
        )

    def _kept(self) -> str:
        return f"The {len(self.ledger):,} answers so far are kept; the same command continues."

    def _each(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Return the result for each item; the first error stops them all."""
        self._stop.clear()

        def one(item: Any) -> Any:
            if self._stop.is_set():
                return None
            try:
                return work(item)
            except BaseException:
                self._stop.set()
                raise

        with ThreadPoolExecutor(self.parallel) as pool:
            futures = [pool.submit(one, item) for item in items]
            try:
                for done in as_completed(futures):
                    done.result()
                    self.advance(1)
            except BaseException:  # a signal, too
                self._stop.set()  # pauses between tries end
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]


class _Refused(UserError):
    """The server refuses a request as such."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


_ONE_TOKEN = {"max_tokens": 1, "logprobs": True, "top_logprobs": 5}
_FEW_WORDS = {"max_tokens": 8}


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

    def __init__(self, ledger: Ledger, lm: FrozenLM, device: torch.device, seed: int = 0) -> None:
        if lm.stack != "decoder":
            raise UserError(
                f"interpretation.hf.name is {lm.name!r}, which does not continue text: use a "
                "causal language model."
            )
        self.ledger, self.seed, self.name = ledger, seed, f"hf {lm.name}"
        self.advance: Callable[[int], object] = int
        self.identity = {"kind": "hf", "model": lm.name, "weights": lm.fingerprint()}
        self.lm, self.device, self.tokenizer = lm, device, lm.tokenizer()
        self.most = context_of(lm.config.get_text_config())

    @cached_property
    def model(self) -> Any:
        """Return the model; it is loaded when the first question has no known answer."""
        return self.lm.load_plain(self.device)

    def check(self) -> None:
        """Do nothing: its files were read when it was made, and it is loaded when needed."""

    def fits(self, prompt: str) -> bool:
        """Return whether the model can read a prompt and write an explanation."""
        return self.most is None or len(self._ids(prompt)) + WORDS <= self.most

    def write(self, prompts: Sequence[str], attempt: int = 0) -> list[str]:
        """Return how the model continues each prompt: the most probable, or a drawn way."""
        found = []
        for prompt in prompts:
            key = self.ledger.key(self.identity, [prompt, attempt, self.seed])
            if self.ledger.get(key) is None:
                self.ledger.add(key, self.name, self._written(prompt, attempt))
            found.append(str(self.ledger.get(key)))
            self.advance(1)
        return found

    def answer(self, questions: Sequence[Question], attempt: int = 0) -> Answers:
        """Return the probability of each option's first token against those of the others.

        Not a number where the model cannot read the question at once.
        """
        keys = [self.ledger.key(self.identity, [q.prompt, q.options]) for q in questions]
        left = [i for i, key in enumerate(keys) if self.ledger.get(key) is None]
        self.advance(len(keys) - len(left))
        ids = {i: self._ids(questions[i].prompt) for i in left}
        left.sort(key=lambda i: len(ids[i]))
        for first in range(0, len(left), TOGETHER):
            chosen = left[first : first + TOGETHER]
            fits = [i for i in chosen if self.most is None or len(ids[i]) <= self.most]
            logits = dict(zip(fits, self._next([ids[i] for i in fits]), strict=True))
            for i in chosen:
                shares = self._shares(logits.get(i), questions[i].options)
                self.ledger.add(keys[i], self.name, shares)
            self.advance(len(chosen))
        return np.array([self.ledger.get(key) for key in keys], float)

    def _ids(self, prompt: str) -> list[int]:
        if self.tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}]
            encoded: Any = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=True
            )
            return list(encoded["input_ids"])
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
    def _next(self, prompts: Sequence[list[int]]) -> Sequence[torch.Tensor]:
        """Return the logits of each prompt's next token."""
        if not prompts:
            return ()
        # padded behind, where no token looks
        ids = pad_sequence([torch.tensor(each) for each in prompts], batch_first=True)
        mask = pad_sequence([torch.ones(len(each)).long() for each in prompts], batch_first=True)
        out = self.model(ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False)
        last = (mask.sum(1) - 1).to(out.logits.device)
        return list(out.logits[torch.arange(len(prompts)), last].float().cpu())

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
