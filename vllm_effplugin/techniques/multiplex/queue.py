"""Which waiting requests start now, so that those in a step merge well. Pure.

Requests start in the order of the queue, whatever they merge with. What is decided is how many of
them: with more waiting behind, a few fewer than would fit, if the last ones would run alone in this
step and merged in the next; with nothing else to do, none, if a request finds no partner and one is
expected soon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_effplugin.techniques.multiplex.config import MultiplexConfig
from vllm_effplugin.techniques.multiplex.grouping import OVERHEAD, form_groups


@dataclass(frozen=True)
class Waiting:
    """A request in the queue.

    Attributes:
        length: tokens to compute.
        tenant: with whom it merges; None with nobody.
        waited: seconds since it arrived.
        passed_over: whether it would have started a step ago, but for its lack of company.
    """

    length: int
    tenant: str | None
    waited: float
    passed_over: bool = False


@dataclass(frozen=True)
class Room:
    """What a step has left.

    Attributes:
        tokens: to compute.
        seats: requests.
        idle: whether the step would otherwise be empty, and none is being run.
    """

    tokens: int
    seats: int
    idle: bool


class Admission:
    """Decides how many requests start.

    Args:
        config: sizes of groups, and how long a request may be held back.
        num_layers: of the model.
    """

    def __init__(self, config: MultiplexConfig, num_layers: int) -> None:
        self._config, self._num_layers = config, num_layers
        self._merged_layers = num_layers - config.depth

    def starting(
        self, queue: Sequence[Waiting], room: Room, gap: float, layer_token: float
    ) -> tuple[int, int]:
        """How many of the queue's first requests start, and how many would without merging.

        Args:
            queue: in order; what is behind its first `room.seats` does not matter.
            gap: seconds expected until another request arrives.
            layer_token: seconds that a token takes in a layer.
        """
        fits = _fitting(queue, room)
        if fits < len(queue):
            return self._well_merged(queue, fits), fits
        if room.idle and self._is_worth_waiting(queue, gap, layer_token):
            return 0, fits
        return fits, fits

    def _well_merged(self, queue: Sequence[Waiting], fits: int) -> int:
        """With more behind: the number up to `fits` that costs least per token.

        At most as many fewer as there are members in a group less one, so that who is passed over
        comes first in the next step; and nobody is twice.
        """
        fewest = max(1, fits - self._config.sizes[-1] + 1)
        fewest = max(fewest, *(i + 1 for i in range(fits) if queue[i].passed_over), 1)
        return min(range(fits, fewest - 1, -1), key=lambda count: self._cost(queue[:count]))

    def _cost(self, started: Sequence[Waiting]) -> float:
        """Layers run per token, when these are a step."""
        lengths = [request.length for request in started]
        groups = form_groups(lengths, [request.tenant for request in started], self._config.sizes)
        whole = sum(lengths)
        saved = sum(
            sum(lengths[row] for row in group) - max(lengths[row] for row in group) * (1 + OVERHEAD)
            for group in groups
        )
        return (whole * self._num_layers - saved * self._merged_layers) / whole

    def _is_worth_waiting(self, queue: Sequence[Waiting], gap: float, layer_token: float) -> bool:
        """Whether all that is there would run alone, and a partner is likely to come in time."""
        if not queue or any(request.tenant is None for request in queue):
            return False
        lengths = [request.length for request in queue]
        if form_groups(lengths, [request.tenant for request in queue], self._config.sizes):
            return False
        limit = self._config.max_wait_ms / 1000
        if max(request.waited for request in queue) + gap > limit:
            return False
        return gap < min(lengths) * self._merged_layers * layer_token


def _fitting(queue: Sequence[Waiting], room: Room) -> int:
    """How many vLLM would start: in order, while they fit whole; the first one in any case."""
    tokens = room.tokens
    for count, request in enumerate(queue):
        if count == room.seats or (request.length > tokens and count):
            return count
        tokens -= request.length
    return len(queue)
