"""Asks any OpenAI-compatible model which of two answers is better, twice, with the answers in both orders.

Its verdict has the form of MT-Bench (Zheng et al. 2023): [[A]], [[B]], or [[C]] for a tie.
"""

import asyncio
import re
from typing import NamedTuple

import httpx

QUESTION = """Two assistants answered the same request. Judge which answer serves the user better: correct, helpful, and what was asked for.
The order of the answers and their length must not matter.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Give a short reason. Then end with one verdict in double brackets: [[A]] if A is better, [[B]] if B is better, [[C]] if they are equal."""
VERDICT = re.compile(r"\[\[([ABC])\]\]")
TRIES, AT_ONCE, SECONDS, LONGEST = 4, 8, 120, 512  # of a question; questions under way; of a try; tokens of an answer


class Refused(Exception):
    """Raised where the judge refuses one question, as a content filter does."""


class Judgement(NamedTuple):
    """The verdicts on one prompt: with the first answer as A, and with it as B; None where no verdict could be read."""

    forward: str | None
    backward: str | None

    @property
    def score(self) -> float | None:
        """1 where the first answer is better in both orders, 0 where the second is, 0.5 for ties and where the order decides.

        None where a verdict is missing.
        """
        if self.forward is None or self.backward is None:
            return None
        return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((self.forward, self.backward), 0.5)

    @property
    def depends_on_order(self) -> bool:
        """Whether the judge preferred the same place in both orders."""
        return self.forward == self.backward != "C" and self.forward is not None


async def judge(url: str, model: str, key: str | None, rows: list[tuple[str, str, str]]) -> tuple[list[Judgement], list[str]]:
    """Return a judgement for each row (prompt, first answer, second answer), and the reasons of refused questions.

    `url` is that of an OpenAI-compatible endpoint, with /v1. Raises ValueError where it cannot be used, or refuses every question.
    """
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"the judge's address {url} is no URL: {error}") from error
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    gate = asyncio.Semaphore(AT_ONCE)
    refusals: list[str] = []
    async with httpx.AsyncClient(base_url=url.rstrip("/") + "/", headers=headers, timeout=SECONDS) as client:

        async def one(prompt: str, first: str, second: str) -> str | None:
            content = QUESTION.format(prompt=prompt, first=first, second=second)
            body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": LONGEST}
            try:
                async with gate:
                    found = VERDICT.findall(await _ask(client, body))
            except Refused as error:
                refusals.append(str(error))
                return None
            return found[-1] if found else None

        both = [one(*row) for prompt, a, b in rows for row in ((prompt, a, b), (prompt, b, a))]
        said = await asyncio.gather(*both)
    if len(refusals) == len(said):
        raise ValueError(f"the judge at {url} cannot be used: {refusals[0]}")
    return [Judgement(forward, backward) for forward, backward in zip(said[::2], said[1::2], strict=True)], refusals


async def _ask(client: httpx.AsyncClient, body: dict) -> str:
    """Return the text of a chat completion, after TRIES at most. Raises Refused for this question, ValueError for the endpoint."""
    for attempt in range(TRIES):
        try:
            response = await client.post("chat/completions", json=body)
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__} {error}"
        else:
            if response.status_code == 200:
                try:
                    return response.json()["choices"][0]["message"]["content"] or ""
                except (ValueError, KeyError, IndexError, TypeError) as error:
                    why = f"it answered with no chat completion but {response.text[:200]!r}"
                    raise ValueError(f"the judge at {client.base_url} cannot be used: {why}") from error
            problem = f"status {response.status_code}: {response.text[:200]}"
            if response.status_code in (400, 413, 422):
                raise Refused(problem)
            if response.status_code not in (408, 429) and response.status_code < 500:
                break
        await asyncio.sleep(2**attempt)
    raise ValueError(f"the judge at {client.base_url} cannot be used: {problem}")
