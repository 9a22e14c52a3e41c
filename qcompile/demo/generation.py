"""Timing and asking a language model: the greedy loop of :mod:`qcompile.generation`, one prompt at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qcompile.generation import Compile, Decoder, steady

__all__ = ["Compile", "GreedyDecoder", "negative_log_likelihood", "no_compile", "steady"]


def no_compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function itself: eager execution."""
    return function


class GreedyDecoder(Decoder):
    """One sequence, greedily continued, with the time that each step takes."""

    def time_prefill(self, tokens: Tensor) -> tuple[float, Tensor]:
        """Seconds for one prompt into an empty cache, and the token that follows it."""
        self.reset()
        start = time.perf_counter()
        token = self.feed(tokens)
        return time.perf_counter() - start, token

    def time_decode(self, token: Tensor, count: int) -> list[float]:
        """Seconds of each of ``count`` steps after one more that is not counted, each fed with the last one's token."""
        token = self.feed(token)  # compiles, where that has not happened yet: under the stance it would raise
        seconds = []
        with steady():
            for _ in range(count):
                start = time.perf_counter()
                token = self.feed(token)
                seconds.append(time.perf_counter() - start)
        return seconds

    def answer(self, prompt: list[int], count: int, stop: set[int]) -> Iterator[int]:
        """The tokens that follow ``prompt``, at most ``count``, ending before one of ``stop``.

        The prompt goes in token by token: prompts differ in length, and each length would be one more program.
        """
        self.reset()
        if not prompt:
            raise ValueError("the prompt has no tokens")
        token = torch.empty(1, 1, dtype=torch.long)
        for known in prompt:
            token = self.feed(torch.tensor([[known]]))
        for _ in range(count):
            number = int(token)
            if number in stop or self.length >= self.max_length:
                return
            yield number
            token = self.feed(token)


def negative_log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """The sum over a text of each token's negative log likelihood given those before it, in nats; a scalar.

    Args:
        logits: float ``[1, n, vocabulary]``, what the model makes of ``tokens``.
        tokens: int64 ``[1, n]``; the first is only given, never predicted.
    """
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="sum")
