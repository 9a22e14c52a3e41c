"""Greedy decoding over a static KV cache: one loop for every causal language model of transformers, float or quantized.

The two shapes that matter (a prompt of one fixed length, and one token) are two programs of the same function, each
compiled once. Nothing in the loop changes a shape, and the cache's tensors are always the same ones, so that neither
guard ever fails and nothing is compiled again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Compile", "GreedyDecoder", "negative_log_likelihood", "no_compile", "steady"]

Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
"""What turns a function of tensors into a faster one: ``torch.compile`` with the options of a variant."""


def no_compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function itself: eager execution."""
    return function


class GreedyDecoder:
    """A causal language model, its static cache, and the function that maps tokens to the next token.

    Args:
        model: a ``PreTrainedModel`` for causal language modelling, in eval mode.
        max_length: how many tokens prompt and answer may have together: the length of the cache.
        compile_fn: applied once to the step function.
    """

    def __init__(self, model: Any, max_length: int, compile_fn: Compile = no_compile) -> None:
        from transformers import StaticCache

        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; a prompt and one token need at least 2")
        self.max_length = max_length
        self.length = 0
        self.cache = StaticCache(config=model.config, max_cache_len=max_length)
        with torch.no_grad():
            # The cache takes its heads, widths and dtype from the first keys it sees. Letting it see them here, outside
            # the compiled region, needs no knowledge of the architecture.
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=self.cache, use_cache=True)
        self.cache.reset()

        def step(tokens: Tensor) -> Tensor:
            out = model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].argmax(-1, keepdim=True)

        self._step = compile_fn(step)

    def reset(self) -> None:
        """Empty the cache."""
        self.cache.reset()
        self.length = 0

    def feed(self, tokens: Tensor) -> Tensor:
        """Append ``tokens``, int64 ``[1, n]``, to the sequence and return the most likely next one, int64 ``[1, 1]``.

        Raises:
            ValueError: ``tokens`` has another shape, or the cache has no room for them.
        """
        if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] == 0:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}, allowed is [1, n] with n of 1 or more")
        if self.length + tokens.shape[1] > self.max_length:
            raise ValueError(
                f"{self.length} tokens and {tokens.shape[1]} more do not fit a cache of {self.max_length}: "
                "make the decoder with a larger max_length, or reset() it"
            )
        # A fresh tensor of the plainest layout: a slice of a longer one has other strides, which is another program.
        tokens = torch.empty(tokens.shape, dtype=torch.long).copy_(tokens)
        with torch.no_grad():
            token = self._step(tokens)
        self.length += tokens.shape[1]
        return token

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


@contextmanager
def steady() -> Iterator[None]:
    """Inside the block Dynamo checks only the guards that tell compiled programs apart.

    Right for a loop that changes neither the model nor a shape it has not compiled before, as torch documents it; with
    some hundred parameters the full check costs as much as several layers.
    """
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        yield


def negative_log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """The sum over a text of each token's negative log likelihood given those before it, in nats; a scalar.

    Args:
        logits: float ``[1, n, vocabulary]``, what the model makes of ``tokens``.
        tokens: int64 ``[1, n]``; the first is only given, never predicted.
    """
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="sum")
