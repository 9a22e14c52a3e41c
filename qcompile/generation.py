"""Generating text with any causal language model of transformers: a static cache, programs of few shapes, no code per model.

A prompt goes in by chunks of fixed lengths, an answer token by token. Each length is one program, compiled when it is first
needed; nothing in the loop changes a shape, and the cache's tensors are always the same ones, so nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from qcompile.ahead import ask_ahead
from qcompile.garbage import collection_paused
from qcompile.owned import own

__all__ = ["Compile", "Decoder", "generate", "greedy", "steady"]

Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
"""What turns a function of tensors into a faster one."""

#: Lengths of prompt that have a program of their own, besides a single token: the longest first.
CHUNKS = (256, 16)


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row: float ``[batch, vocabulary]`` to int64 ``[batch, 1]``."""
    return logits.argmax(-1, keepdim=True)


class Decoder:
    """A causal language model, its static cache, and the function that maps tokens to the next token.

    Args:
        model: a ``PreTrainedModel`` for causal language modelling, in eval mode.
        max_length: how many tokens prompt and answer may have together: the length of the cache.
        compile_fn: applied once to the step function; None leaves it eager.
        batch: rows that are decoded at a time.
        pick: from the logits ``[batch, vocabulary]`` to the next tokens ``[batch, 1]``; compiled with the rest.

    Raises:
        ValueError: a cache without room for a token after the prompt, or an empty batch.
        ImportError: transformers is not installed.
    """

    def __init__(
        self,
        model: Any,
        max_length: int,
        compile_fn: Compile | None = None,
        *,
        batch: int = 1,
        pick: Callable[[Tensor], Tensor] = greedy,
    ) -> None:
        try:
            from transformers import StaticCache
        except ImportError as error:
            raise ImportError("generating needs transformers: pip install 'transformers>=5'") from error

        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; a prompt and one token need at least 2")
        if batch < 1:
            raise ValueError(f"batch is {batch}; it must be at least 1")
        self.max_length, self.batch = max_length, batch
        self.length = 0
        self.cache = StaticCache(config=model.config, max_cache_len=max_length)
        with torch.no_grad():
            # The cache takes its heads, widths and dtype from the first keys it sees. Letting it see them here, outside
            # the compiled region, needs no knowledge of the architecture.
            model(input_ids=torch.zeros(batch, 1, dtype=torch.long), past_key_values=self.cache, use_cache=True)
        self.cache.reset()
        own(self, self._static())

        def step(tokens: Tensor) -> Tensor:
            out = model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            return pick(out.logits[:, -1])

        self._step = step if compile_fn is None else compile_fn(step)
        self._compiled = compile_fn is not None
        #: Lengths of input that were met before: any other is compiled when it comes.
        self._lengths: set[int] = set()

    def _static(self) -> Iterator[Tensor]:
        """The tensors of the cache of which transformers promises that they stay where they are."""
        for layer in self.cache.layers:
            for held in vars(layer).values():
                if isinstance(held, Tensor) and hasattr(held, "_dynamo_static_input_type"):
                    yield held

    def reset(self) -> None:
        """Empty the cache."""
        self.cache.reset()
        self.length = 0

    def feed(self, tokens: Tensor) -> Tensor:
        """Append ``tokens``, int64 ``[batch, n]``, to the sequences and return the next ones, int64 ``[batch, 1]``.

        Raises:
            ValueError: ``tokens`` has another shape, or the cache has no room for them.
        """
        if tokens.dim() != 2 or tokens.shape[0] != self.batch or tokens.shape[1] == 0:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}, allowed is [{self.batch}, n] with n of 1 or more")
        if self.length + tokens.shape[1] > self.max_length:
            raise ValueError(
                f"{self.length} tokens and {tokens.shape[1]} more do not fit a cache of {self.max_length}: "
                "make the decoder with a larger max_length, or reset() it"
            )
        # A fresh tensor of the plainest layout: a slice of a longer one has other strides, which is another program.
        tokens = torch.empty(tokens.shape, dtype=torch.long).copy_(tokens)
        known = tokens.shape[1] in self._lengths
        if not known and self._compiled:
            ask_ahead()
        with torch.no_grad(), nullcontext() if known else collection_paused():
            token = self._step(tokens)
        self._lengths.add(tokens.shape[1])
        self.length += tokens.shape[1]
        return token

    def prompt(self, tokens: Tensor, chunks: Sequence[int] = CHUNKS) -> Tensor:
        """Append a prompt of any length by chunks: as many of the first length as fit, then of the next, then single tokens.

        Args:
            tokens: int64 ``[batch, n]``.
            chunks: lengths that may be compiled, the longest first.

        Returns:
            The tokens that follow, int64 ``[batch, 1]``.

        Raises:
            ValueError: an empty prompt, one that does not fit the cache, or a chunk of no length.
        """
        if any(c < 1 for c in chunks):
            raise ValueError(f"chunks must be positive lengths, got {tuple(chunks)}")
        if tokens.dim() != 2 or tokens.shape[1] == 0 or self.length + tokens.shape[1] > self.max_length:
            return self.feed(tokens)  # which says what is wrong before any of it goes in
        at, token = 0, tokens
        for size in (*sorted(chunks, reverse=True), 1):
            while tokens.shape[1] - at >= size:
                token = self.feed(tokens[:, at : at + size])
                at += size
        return token

    def stream(self, tokens: Tensor, count: int, chunks: Sequence[int] = CHUNKS) -> Iterator[Tensor]:
        """The tokens that follow a prompt, int64 ``[batch, 1]`` each: at most ``count``, and as many as the cache holds."""
        self.reset()
        token = self.prompt(tokens, chunks)
        for i in range(count):
            yield token
            if self.length >= self.max_length or i + 1 == count:
                return
            token = self.feed(token)


@contextmanager
def steady() -> Iterator[None]:
    """Inside the block Dynamo checks only the guards that tell compiled programs apart.

    Right for a loop that changes neither the model nor a shape it has not compiled before, as torch documents it; with
    some hundred parameters the full check costs as much as several layers.
    """
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        yield


def generate(
    model: Any,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    stop: Collection[int] = (),
    pick: Callable[[Tensor], Tensor] = greedy,
    chunks: Sequence[int] = CHUNKS,
    on_token: Callable[[Tensor], object] | None = None,
    **options: Any,
) -> Tensor:
    """Continue prompts with a quantized, compiled model of transformers.

    The model is compiled by :func:`qcompile.trace`; its float weights are released as that documents it (pass
    ``keep_float=True`` to go on using the module itself). For several prompts make a :class:`Decoder` once, so that nothing
    is compiled twice: ``Decoder(model, 512, lambda step: qcompile.trace(step, weights="qint4"))``.

    Args:
        model: a ``PreTrainedModel`` for causal language modelling, in eval mode.
        tokens: int64 ``[batch, n]``: prompts of one length.
        max_new_tokens: how many tokens to add, at most.
        stop: tokens that end a row; it ends when all rows have met one, and a row that has ended repeats its own.
        pick: from logits ``[batch, vocabulary]`` to tokens ``[batch, 1]``; the most likely ones by default.
        chunks: lengths of prompt that get a program of their own.
        on_token: called with the tokens ``[batch, 1]`` of each step.
        options: of the backend: ``weights``, ``group_size``, …; see :class:`qcompile.options.Options`.

    Returns:
        Prompts and what follows, int64 ``[batch, n + at most max_new_tokens]``.

    Raises:
        ValueError: an empty prompt, no tokens asked for, an option that is not allowed.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=97)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
        >>> generate(model, torch.tensor([[5, 9, 2]]), 4, weights="qint8").shape
        torch.Size([1, 7])
    """
    from qcompile.api import trace
    from qcompile.options import Options

    Options.parse(options)
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must be [batch, n] with n of 1 or more, got {list(tokens.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")

    def compiled(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return trace(step, **options)

    decoder = Decoder(model, tokens.shape[1] + max_new_tokens, compiled, batch=tokens.shape[0], pick=pick)
    ends = torch.tensor(sorted(stop), dtype=torch.long)
    done, found, last = torch.zeros(tokens.shape[0], 1, dtype=torch.bool), [tokens], None
    for token in decoder.stream(tokens, max_new_tokens, chunks):
        last = token.clone() if last is None else torch.where(done, last, token)
        found.append(last)
        if on_token is not None:
            on_token(last)
        done = done | torch.isin(last, ends)
        if bool(done.all()):
            break
    return torch.cat(found, 1)
