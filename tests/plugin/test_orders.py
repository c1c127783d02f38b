"""Orders to the scheduler: carried out once, given up in time, asked again where it takes a rank long."""

import threading
import time

import pytest

from onlinespec.errors import NotYetError, SwapError
from onlinespec.plugin import orders as module
from onlinespec.plugin.orders import Orders
from onlinespec.plugin.swap import ExpectStaged

ORDER = ExpectStaged(7)


class Scheduler(threading.Thread):
    """Takes and handles as SGLang's loop does, until there are no answers left or `close`.

    answers: what carrying out raises, one each; None for nothing.
    """

    def __init__(self, orders: Orders, answers: list[Exception | None]):
        super().__init__(daemon=True)
        self.orders = orders
        self.answers = answers
        self.carried_out: list[object] = []
        self.start()

    def run(self) -> None:
        while self.answers:
            requests: list = []
            self.orders.take(requests)
            for delivery in requests:
                self.orders.handle(delivery, self.carry_out)
            time.sleep(0.001)

    def carry_out(self, order: object) -> None:
        self.carried_out.append(order)
        answer = self.answers.pop(0)
        if answer is not None:
            raise answer

    def close(self) -> None:
        self.answers.clear()
        self.join()


def test_an_order_is_carried_out_once_and_its_refusal_reaches_who_sent_it():
    orders = Orders()
    scheduler = Scheduler(orders, [None, SwapError("no room")])

    orders.send(ORDER)
    with pytest.raises(SwapError, match="no room"):
        orders.send(ORDER)

    assert scheduler.carried_out == [ORDER, ORDER]


def test_what_some_rank_is_still_at_is_asked_again_until_it_is_done():
    orders = Orders()
    scheduler = Scheduler(orders, [NotYetError("staging"), NotYetError("staging"), None])

    orders.ask(ORDER)

    assert scheduler.carried_out == [ORDER] * 3


def test_a_refusal_ends_the_asking():
    orders = Orders()
    Scheduler(orders, [NotYetError("staging"), SwapError("damaged")])

    with pytest.raises(SwapError, match="damaged"):
        orders.ask(ORDER)


def test_a_rank_that_never_gets_done_is_given_up_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_TIMEOUT_S", 0.2)
    orders = Orders()
    scheduler = Scheduler(orders, [NotYetError("version 7 is still being staged")] * 1000)

    with pytest.raises(SwapError, match=r"version 7 is still being staged, after 0 s; it is given up") as caught:
        orders.ask(ORDER)
    scheduler.close()

    assert not isinstance(caught.value, NotYetError)


def test_an_order_that_no_scheduler_takes_is_given_up_and_then_never_carried_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_TIMEOUT_S", 0.05)
    orders, requests = Orders(), []

    with pytest.raises(SwapError, match="did not take the order"):
        orders.send(ORDER)
    orders.take(requests)

    assert requests == []


def test_a_fault_while_it_is_carried_out_is_told_as_one():
    orders = Orders()

    def fail(_order: object) -> None:
        raise RuntimeError("ours")

    def serve() -> None:
        requests: list = []
        while not requests:
            orders.take(requests)
            time.sleep(0.001)
        with pytest.raises(RuntimeError, match="ours"):
            orders.handle(requests[0], fail)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with pytest.raises(SwapError, match="a fault in the server"):
        orders.send(ORDER)
    thread.join()
