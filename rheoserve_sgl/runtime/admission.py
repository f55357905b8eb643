"""Which of the prefilled requests decode: as many as have room for what they select.

What a request has selected over the last steps is its working set. While the working sets of all that decode fit the
frames, nearly all that is selected is resident; beyond that every request added makes the CPU's share of all grow.
Source of the idea: SparseServe's working-set-aware batch size control (arXiv 2509.24626).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SLACK = 1.1  # of the frames: what decodes already may grow by this before one has to pause
CALM = 4  # windows with less than half of the misses that are allowed, until more requests are tried
LASTS = 8  # windows in a row with too many misses: so many tell, whoever joined in them
FORGETS = 8  # windows in which a bound stopped nobody until it is no more
EASES = 0.8  # of the misses of the window before: with fewer, blocks are still on their way
NO_BOUND = 1 << 30


@dataclass(frozen=True)
class Candidate:
    """A prefilled request.

    need: pages of frames that each KV head of a layer needs for it
    decodes: whether it took part in the last step
    ends: whether it was aborted, so that one more step ends it
    loaded: whether what matters of it had time to come into frames
    """

    need: float
    decodes: bool
    ends: bool = False
    loaded: bool = True


class Admission:
    """Decides before each step, the same for the same history.

    Args:
        capacity: pages for which each KV head of a layer has frames
        most_missed: share of the selection that may be missed before the newest requests pause
        group: requests that join together
        patience: steps that a request waits at most for its group
    """

    def __init__(self, capacity: float, most_missed: float, group: int = 1, patience: int = 0):
        self.capacity, self.most_missed = capacity, most_missed
        self.group, self.patience = group, patience
        self.bound = NO_BOUND  # requests at once, after too many misses
        self._too_many = NO_BOUND  # requests at once that missed too much
        self._bad = 0  # windows in a row with too many misses
        self._before = math.inf  # share missed in the window before, if few joined in it
        # Windows since the bound was set: of few misses, all without too many, in which it stopped nobody.
        self._calm = self._windows = self._idle = 0
        self._stopped = False
        self._waited = 0
        self.coming: list[int] = []  # rows that have their room, but did not join at the last choice

    def choose(
        self, candidates: Sequence[Candidate], more_coming: bool, allows: Callable[[int], bool] = lambda row: True
    ) -> list[int]:
        """The rows that decode next, in order: by age each that fits beside older ones, at least one, and all that end.

        A request has its room before any newer one is looked at: none waits for those that came later. One that has to
        wait leaves its room to newer ones that need less, and takes it back when it fits. While others decode, one that
        has room joins when it is loaded.

        Args:
            candidates: oldest first
            more_coming: whether another request may be prefilled soon, for which a group may wait
            allows: another limit, asked by age of each that has room; whom it allows decodes. It allows the first.
        """
        self._stopped |= len(candidates) > self.bound
        end, stay, join, total, newest = [], [], [], 0.0, -1
        for row, one in enumerate(candidates):
            if one.ends:
                end.append(row)
                continue
            newest = row if one.decodes else newest
            count = len(stay) + len(join)
            room = self.capacity * (SLACK if one.decodes else 1.0)
            if (not count or (total + one.need <= room and count < self.bound)) and allows(row):
                total += one.need
                (stay if one.decodes else join).append(row)
        if stay and join and join[0] > newest and more_coming and self._may_wait(len(join)):
            self.coming = join
            return sorted(end + stay)
        ready = [row for row in join if candidates[row].loaded]
        if not stay and not ready:
            ready = join  # nothing would decode meanwhile
        self.coming = [row for row in join if row not in ready]
        if ready or not join:
            self._waited = 0
        return sorted(end + stay + ready)

    def _may_wait(self, joining: int) -> bool:
        """Whether so many, all newer than whatever decodes, wait one more step for others to join with."""
        waits = joining < self.group and self._waited < self.patience
        self._waited += waits
        return waits

    def observe(self, missed: float, decoding: int, steady: bool = True):
        """Learn from a window of steps.

        Args:
            missed: share of what was selected in it that was not resident
            decoding: requests at once, the most in it
            steady: whether few joined in it: those that just did miss much, which tells nothing
        """
        self._idle = 0 if self._stopped else self._idle + 1
        self._stopped = False
        if self._idle >= FORGETS:
            self.bound = self._too_many = NO_BOUND  # those that come later may be others
        # Requests that join find nothing in frames, and blocks come for some windows: these are too many only if that
        # does not become better.
        self._bad = self._bad + 1 if missed > self.most_missed and decoding > 1 else 0
        lasts = steady and self._before > self.most_missed and missed > EASES * self._before
        lasts = lasts or self._bad >= LASTS
        self._before = missed if steady else math.inf
        if missed > self.most_missed:
            self._calm = self._windows = 0
            if lasts and decoding > 1:
                self._too_many, self._bad = decoding, 0
                fit = math.ceil(decoding * (1.0 - missed) / (1.0 - self.most_missed + 1e-9))  # by what found a frame
                self.bound = max(min(fit, decoding - max(decoding // 8, 1)), 1)
                self._before, self._idle = math.inf, 0
        elif self.bound < NO_BOUND:
            self._calm += missed < self.most_missed / 2
            self._windows += 1
            if self._calm >= CALM or self._windows >= 2 * CALM:
                self._grow(calm=self._calm >= CALM)
                self._calm = self._windows = 0

    def _grow(self, calm: bool):
        """Try more requests at once: half as many more while that is fewer than were too many, else an eighth."""
        if calm and self.bound >= self._too_many:
            self._too_many = NO_BOUND  # no longer
        eighth, half = max(self.bound // 8, 1), max(self.bound // 2, 1)
        more = half if calm and self.bound + half < self._too_many else eighth
        if calm or self.bound + more < self._too_many:
            self.bound += more
