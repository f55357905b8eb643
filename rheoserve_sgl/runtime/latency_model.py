"""What a decode step takes, predicted from what it reads: starts from measured rates, learns from measured steps.

A step reads the weights, the resident blocks and the gate's keys at the device's rate, while the CPU reads what it
visits at its own; of the latter only what takes longer than the resident blocks is waited for. Each of those times has
a factor, 1 or so at first. A Kalman filter over windows of steps learns them, and keeps near its prior what no
measurement tells apart.
"""

from dataclasses import dataclass

import numpy as np

from rheoserve_sgl.runtime.latency_cache import LatencyCache

FIXED_SECONDS = 0.002  # of a step, beside reading the weights
TERMS = ("fixed", "requests", "resident", "scored", "exposed")
PRIOR = np.array([1.0, 1.0, 1.0, 3.0, 1.0])
SPREAD = np.array([1.0, 3.0, 0.3, 3.0, 0.7])  # standard deviations of the prior
REQUEST_SECONDS = 0.0001
AGED = 0.3  # of the prior's spread: how far factors of an earlier start may be off
LEAST = 0.1  # of the prior: by a smaller factor nothing drifts less than by this one
KEPT_EVERY = 32  # windows
OUTLIER = 3.0  # standard deviations: what is off by more counts as so much
NOISE, DRIFT = 0.02, 0.01  # of a measurement; of each factor, from window to window


@dataclass(frozen=True)
class Rates:
    """Bytes a second: what the device reads, what the CPU's attention reads. beside: whether both read at once."""

    device: float
    host: float
    beside: bool


@dataclass(frozen=True)
class StepLoad:
    """What a step reads, in bytes over all layers and KV heads, and for how many requests."""

    requests: int
    resident: float
    scored: float
    visited: float


class LatencyModel:
    """Predicts and learns.

    Args:
        rates: measured at start-up
        weight_bytes: of the model, read at every step
        cache: where what is known is kept for the next start
    """

    def __init__(self, rates: Rates, weight_bytes: int, cache: LatencyCache | None = None):
        self.rates, self._cache = rates, cache
        self._learnt = False  # whether the factors are more than the prior
        self._fixed = FIXED_SECONDS + weight_bytes / rates.device
        self.factors = PRIOR.copy()
        self._covariance = np.diag(SPREAD**2)
        self.windows = 0

    def resume(self, factors: list[float]):
        """Go on from what was learnt at an earlier start."""
        self.factors, self._learnt = np.array(factors), True
        self._covariance = np.diag((AGED * SPREAD) ** 2)

    def terms(self, load: StepLoad) -> np.ndarray:
        """Seconds of each term before its factor, in the order of TERMS."""
        resident, host = load.resident / self.rates.device, load.visited / self.rates.host
        exposed = max(host - resident, 0.0) if self.rates.beside else host
        scored = load.scored / self.rates.device
        return np.array([self._fixed, load.requests * REQUEST_SECONDS, resident, scored, exposed])

    def predict(self, load: StepLoad) -> float:
        """Seconds of one step."""
        return float(self.terms(load) @ self.factors)

    def observe(self, load: StepLoad, seconds: float):
        """Learn from steps that took so long on average."""
        terms = self.terms(load)
        # (A factor that has come to 0 must find its way back.)
        self._covariance += np.diag((DRIFT * np.maximum(self.factors, LEAST * PRIOR)) ** 2)
        towards = self._covariance @ terms
        variance = terms @ towards + (NOISE * seconds) ** 2
        gain, off = towards / variance, seconds - terms @ self.factors
        # One window that something else made long says little of the next; many of them do (Huber's bound).
        most = OUTLIER * variance**0.5
        off = min(max(off, -most), most)
        self.factors = np.maximum(self.factors + gain * off, 0.0)
        self._covariance -= np.outer(gain, towards)
        self.windows += 1
        if self.windows % KEPT_EVERY == 0:
            self._learnt = True
            self.keep()

    def keep(self):
        """For the next start."""
        if self._cache is not None:
            factors = self.factors.tolist() if self._learnt else None
            self._cache.write(self.rates.device, self.rates.host, factors)
