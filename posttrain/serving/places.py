"""How many requests of a model there may be, and how many of them are worked on before their answers begin."""

import asyncio
from collections import deque

SHARED = 4  # requests of a model that are read, or wait for their first token, at once, while another model has requests, but fewer
REST, LONGEST_REST = 2.0, 0.1  # then, from a first token to the next request's turn: times what it took, and in seconds


class Places:
    """The places of one model's requests.

    Of those whose answers have not begun, so many are read and given to generation as it takes at once, in the order in which they came;
    nothing is done for the others. While another model has requests, but fewer, they are few, with rests: all share the event loop and
    the processors, so that hundreds for one model, which came in the same instant, would delay all others' answers.
    """

    def __init__(self, batch: int, queue: int, all_models: dict[str, "Places"]):
        """`batch` requests are generated at once, and `queue` may wait. `all_models` has each model's places, these included."""
        self.batch, self.most, self.taken, self.all_models = batch, batch + queue, 0, all_models
        self.in_turn, self.waiting = 0, deque[Place]()

    def take(self) -> "Place | None":
        """Take a place; None where all are taken. Nothing is awaited here, so that no other request takes the same one."""
        if self.taken >= self.most:
            return None
        self.taken += 1
        return Place(self)

    def must_spare_others(self) -> bool:
        """Whether another model has requests just now, but fewer."""
        return any(0 < places.taken < self.taken for places in self.all_models.values())

    def give_turns(self) -> None:
        """Let those that wait have the turns that are free."""
        most = min(SHARED, self.batch) if self.must_spare_others() else self.batch
        while self.waiting and self.in_turn < most:
            place = self.waiting.popleft()
            if not place.turn.done():  # its client may have left
                self.in_turn += 1
                place.began = place.loop.time()
                place.turn.set_result(None)

    def end_turn(self) -> None:
        """Count one turn less."""
        self.in_turn -= 1
        self.give_turns()


class Place:
    """The place of one request, from its arrival until `leave`."""

    def __init__(self, places: Places):
        self.places, self.loop = places, asyncio.get_running_loop()
        self.turn: asyncio.Future = self.loop.create_future()
        self.began: float | None = None  # when its turn began, while it has it

    async def wait(self) -> None:
        """Wait until it is this request's turn."""
        self.places.waiting.append(self)
        self.places.give_turns()
        await self.turn

    def answered(self) -> None:
        """Let the next one have its turn: this one's answer has begun, or has ended without."""
        if self.began is not None:
            took, self.began = self.loop.time() - self.began, None
            rest = min(REST * took, LONGEST_REST) if self.places.must_spare_others() else 0.0
            self.loop.call_later(rest, self.places.end_turn)

    def leave(self) -> None:
        """Give up the place."""
        self.answered()
        self.turn.cancel()
        self.places.taken -= 1
