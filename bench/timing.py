"""Three ways to time calls: cold in rounds, in a short burst, and under sustained load."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .device import Call, Device

SEGMENTS = 10
"""Timed stretches of a back-to-back run; their median is reported."""
BURST_SECONDS = 0.01
BURST_IDLE_SECONDS = 0.1
SUSTAINED_SECONDS = 0.3
"""By default."""


@dataclass(frozen=True, slots=True)
class Times:
    """Median and the 20th and 80th percentile of single calls, in microseconds."""

    median: float
    p20: float
    p80: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """Return the statistics of these seconds."""
        p20, median, p80 = (1e6 * float(t) for t in np.percentile(seconds, (20, 50, 80)))
        return cls(median=median, p20=p20, p80=p80, runs=len(seconds))


def time_cold(device: Device, calls: Sequence[Call], rounds: int) -> list[Times]:
    """Time every call with a clean cache, in rounds (A B C A B C ...), so that drift of the machine hits all alike."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        pending = []
        for call in calls:
            device.scrub()
            pending.append(device.start(call))
        for samples, elapsed in zip(seconds, pending, strict=True):
            samples.append(elapsed())
    return [Times.of(samples) for samples in seconds]


def time_burst(device: Device, call: Call, estimate: float) -> float:
    """Return microseconds a call of a short back-to-back run on a rested device with warm caches."""
    time.sleep(BURST_IDLE_SECONDS)
    return _back_to_back(device, call, BURST_SECONDS, estimate)


def time_sustained(device: Device, call: Call, estimate: float, seconds: float = SUSTAINED_SECONDS) -> float:
    """Return microseconds a call under load long enough for the power limit to bind."""
    return _back_to_back(device, call, seconds, estimate)


def _back_to_back(device: Device, call: Call, seconds: float, estimate: float) -> float:
    calls = max(1, round(seconds / SEGMENTS / estimate))
    pending = [device.start(call, calls) for _ in range(SEGMENTS)]
    return 1e6 * float(np.median([elapsed() for elapsed in pending])) / calls
