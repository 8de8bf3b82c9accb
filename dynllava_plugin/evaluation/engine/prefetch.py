"""Requests built and their images decoded in the background, one window ahead of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from dynllava_plugin.evaluation.engine.requests import Request


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as the vision tower takes it.

    Attributes
    ----------
    key : bytes
        Equal for images with equal pixels after resizing.
    pixels : float32 [3, H, W]
    """

    key: bytes
    pixels: torch.Tensor


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request as the model takes it.

    Attributes
    ----------
    index : int
        Its place in the caller's sequence.
    request : Request
    images : tuple of PreparedImage
        Those that are encoded apart; their questions share batches.
    ids : list of int
        Tokens of the text that the model is given; of an image that is encoded apart one, else all.
    tensors : dict
        The images as arguments of the model, where it encodes them itself.
    """

    index: int
    request: Request
    images: tuple[PreparedImage, ...]
    ids: list[int]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def _growing_ranges(total: int, first: int, most: int) -> Iterator[range]:
    start, length = 0, min(first, most)
    while start < total:
        yield range(start, min(start + length, total))
        start, length = start + length, min(2 * length, most)


class Preparation:
    """Turns requests into `Prepared` ones.

    Parameters
    ----------
    prepare : callable
        (place, request, text that the model is given) -> Prepared, as `Encoder.prepare`.
    """

    def __init__(self, prepare: Callable[[int, Request, str], Prepared]) -> None:
        self._prepare = prepare

    def windows(
        self, requests: Sequence[Request], text_of: Callable[[Request], str], size: int, first: int
    ) -> Iterator[list[Prepared]]:
        """All of `requests`, `size` at a time, the next window in the making while one is worked on.

        Nothing is worked on while the first window is made, so that it has `first` requests only; each has twice as many
        as the one before, up to `size`. `text_of` is what the model is given of a request. `requests` may build an item
        when it is indexed; that happens in the background thread too, in order.

        Raises
        ------
        UserError
            For a request with a bad image, or with other than one image for each ``<image>``.
        """
        ranges = list(_growing_ranges(len(requests), first, size))
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
            ahead = pool.submit(self._window, requests, text_of, ranges[0]) if ranges else None
            for place in range(len(ranges)):
                assert ahead is not None
                window = ahead.result()
                following = ranges[place + 1] if place + 1 < len(ranges) else None
                ahead = (
                    pool.submit(self._window, requests, text_of, following) if following is not None else None
                )
                try:
                    yield window
                except GeneratorExit:
                    if ahead is not None:
                        ahead.cancel()
                    raise

    def _window(
        self, requests: Sequence[Request], text_of: Callable[[Request], str], indices: range
    ) -> list[Prepared]:
        found = ((index, requests[index]) for index in indices)
        return [self._prepare(index, request, text_of(request)) for index, request in found]
