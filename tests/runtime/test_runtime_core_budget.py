"""Detectors of one process do not run more threads than there are cores."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from anchorline.runtime.backends import cpu_options as core_budget
from anchorline.runtime.backends.cpu_options import CoreBudget
from anchorline.runtime.detector import Detector

pytest.importorskip("onnxruntime")


class Counting:
    """A session that notes how many threads are at work at once.

    Where several fit into the budget, none ends before another one has joined it.
    """

    def __init__(self, session, threads, state):
        self.session, self.threads, self.state = session, threads, state

    def run(self, *arguments):
        with self.state["lock"]:
            self.state["now"] += self.threads
            self.state["most"] = max(self.state["most"], self.state["now"])
            if self.state["now"] > self.threads:
                self.state["joined"].set()
        if self.threads < 3:
            self.state["joined"].wait(60.0)
        time.sleep(0.01)
        try:
            return self.session.run(*arguments)
        finally:
            with self.state["lock"]:
                self.state["now"] -= self.threads


@pytest.mark.parametrize(("threads", "most"), [(1, 4), (2, 4), (3, 3), (4, 4), (9, 9)])
def test_detectors_take_turns(model_path, monkeypatch, threads, most):
    monkeypatch.setattr(core_budget, "_budgets", {core_budget.os.getpid(): CoreBudget(4)})
    state = {"now": 0, "most": 0, "lock": threading.Lock(), "joined": threading.Event()}
    count = 6 if threads < 3 else 3  # large ones are slow to open
    detectors = [Detector(model_path, "cpu", threads=threads) for _ in range(count)]
    for detector in detectors:
        detector._backend._session = Counting(detector._backend._session, threads, state)
    with ThreadPoolExecutor(count) as pool:
        found = list(
            pool.map(lambda d: [len(d(np.full((9, 9, 3), 99, np.uint8))) for _ in range(4)], detectors)
        )
    for detector in detectors:
        detector.close()
    assert found == [[2] * 4] * count
    assert state["now"] == 0
    assert state["most"] <= most
    if threads < 3:
        assert state["most"] > threads  # small ones do run together


def test_a_failure_gives_the_cores_back():
    budget = CoreBudget(2)
    for _ in range(5):
        with pytest.raises(ValueError, match="x"), budget.lent(2):
            raise ValueError("x")
    with budget.lent(2):
        pass


def test_first_come_first_served():
    budget, order = CoreBudget(2), []
    ready = threading.Event()

    def take(threads, name):
        with budget.lent(threads):
            order.append(name)

    workers = []
    with budget.lent(1):
        for threads, name in ((2, "large"), (1, "small")):  # the small one does not overtake
            worker = threading.Thread(target=take, args=(threads, name))
            worker.start()
            workers.append(worker)
            while len(budget._waiting) < len(workers):
                ready.wait(0.001)
        assert order == []
    for worker in workers:
        worker.join(60)
    assert order == ["large", "small"]
