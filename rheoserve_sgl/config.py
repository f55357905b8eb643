"""RheoServe's settings: one frozen object, validated when it is built."""

import math
from dataclasses import asdict, dataclass

from rheoserve_sgl import PAGE_TOKENS

MODES = ("balanced", "retrieval", "window", "full")
SELECTORS = ("auto", "seer", "quest", "mean", "oracle")
GATE_ROPE = ("first", "last")
DEVICE_ATTENTION = ("resident", "selected")
CANARY = ("off", "log", "raise")
ADMISSION = ("auto", "on", "off")
ALL_PAGES = 2**31 - 1  # a limit that is none
DEFAULT_TOKEN_BUDGET = 4096
DEFAULT_HOST_RATIO = 4.0
PREFIX = "rheoserve_"


@dataclass(frozen=True)
class RheoConfig:
    """What the `--rheoserve-*` flags say. Token counts are in tokens, sizes in GB (10^9 bytes).

    Raises:
        ValueError: a field outside its legal values, named with its flag.
    """

    mode: str = "balanced"
    selector: str = "auto"  # "seer" with gate_path, else "quest"
    gate_path: str | None = None
    gate_rope: str = "first"
    dense_layers: int | None = None  # None: what the learned gate was made with, or 0
    token_budget: int | None = None  # None: DEFAULT_TOKEN_BUDGET, or unused under a threshold
    most_token_budget: int | None = None  # that a request may choose; None: any
    threshold: float | None = None
    device_tokens: int | None = None  # None: what SGLang's memory profiling yields
    host_size: float | None = None  # None: host_ratio decides
    host_ratio: float | None = None  # None: DEFAULT_HOST_RATIO
    sink_tokens: int = 64
    window_tokens: int = 512
    exchange_interval: int = 16
    host_threads: int | None = None  # None: all processors this process may use
    device_attention: str = "resident"
    canary: str = "off"
    admission: str = "auto"  # on where there is a GPU
    most_missed: float = 0.25
    join_group: int = 4
    join_patience: int = 0  # decode steps
    decode_interleave: int = 8  # decode steps
    tpot_slo_ms: float | None = None

    def __post_init__(self):
        self._choice("mode", MODES)
        self._choice("selector", SELECTORS)
        if self.selector == "seer" and self.gate_path is None:
            self._refuse("selector", f"seer with {flag('gate_path')}; without weights quest or mean")
        if self.selector == "auto":
            object.__setattr__(self, "selector", "quest" if self.gate_path is None else "seer")
        self._choice("gate_rope", GATE_ROPE)
        self._at_least("dense_layers", 0)
        self._choice("device_attention", DEVICE_ATTENTION)
        self._choice("canary", CANARY)
        self._choice("admission", ADMISSION)
        self._within("most_missed", 1.0, "a number above 0, at most 1")
        self._at_least("join_group", 1)
        self._at_least("join_patience", 0)
        self._at_least("decode_interleave", 0)
        self._above_zero("tpot_slo_ms")
        self._pages("sink_tokens", at_least=PAGE_TOKENS)
        self._pages("window_tokens", at_least=0)
        self._pages("device_tokens", at_least=PAGE_TOKENS)
        self._pages("token_budget", at_least=PAGE_TOKENS)
        self._pages("most_token_budget", at_least=PAGE_TOKENS)
        self._at_least("exchange_interval", 1)
        self._at_least("host_threads", 1)
        self._above_zero("host_size")
        self._above_zero("host_ratio")
        if self.host_size is not None and self.host_ratio is not None:
            self._refuse("host_size", f"only one of it and {flag('host_ratio')} ({self.host_ratio})")
        self._within("threshold", math.nextafter(1.0, 0.0), "a number above 0 and below 1")
        if self.threshold is not None and self.token_budget is not None:
            self._refuse("threshold", f"only one of it and {flag('token_budget')} ({self.token_budget})")
        if self.threshold is None and self.selects and self.budget < self.always_tokens:
            self._refuse(
                "token_budget",
                f"at least {self.always_tokens} (sink {self.sink_tokens} + window {self.window_tokens} + "
                f"the newest page {PAGE_TOKENS}, which are always selected)",
                value=self.budget,
            )
        if self.most_token_budget is not None and not self.takes_budgets:
            self._refuse("most_token_budget", "none where requests have no token budget")
        if self.most_token_budget is not None and self.most_token_budget < self.budget:
            self._refuse("most_token_budget", f"at least {flag('token_budget')} ({self.budget})")
        if self.gate_rope == "last" and self.selector != "seer":
            self._refuse("gate_rope", f"first, without a learned gate ({flag('gate_path')})")
        if self.admission == "on" and self.mode != "balanced":
            self._refuse("admission", f"auto or off with {flag('mode')} {self.mode}; on with balanced")

    @property
    def selects(self) -> bool:
        """Whether a gate picks blocks (the other modes know theirs beforehand)."""
        return self.mode in ("balanced", "retrieval")

    @property
    def takes_budgets(self) -> bool:
        """Whether a request may choose a token budget of its own."""
        return self.selects and self.threshold is None

    @property
    def budget(self) -> int:
        """Tokens selected for each KV head at each step, when there is no threshold."""
        return DEFAULT_TOKEN_BUDGET if self.token_budget is None else self.token_budget

    @property
    def always_tokens(self) -> int:
        """Tokens that are always selected: sink, window and the newest page."""
        return self.sink_tokens + self.window_tokens + PAGE_TOKENS

    @property
    def budget_pages(self) -> int:
        """Pages that each KV head may select at each step, when there is no threshold; 0 for sink and window only."""
        return {"full": ALL_PAGES, "window": 0}.get(self.mode, self.budget // PAGE_TOKENS)

    @property
    def sink_pages(self) -> int:
        return self.sink_tokens // PAGE_TOKENS

    @property
    def window_pages(self) -> int:
        """Full pages before the newest one; the newest is always selected on top."""
        return self.window_tokens // PAGE_TOKENS

    @property
    def attends_selected_only(self) -> bool:
        """Whether resident blocks that were not selected are left out of the attention."""
        return self.device_attention == "selected" or self.mode == "window"

    def admits(self, on_gpu: bool) -> bool:
        """Whether only those requests decode whose working sets fit the frames. Only `balanced` fills frames by what is
        selected, and without a GPU frames are no faster than the host store."""
        return self.mode == "balanced" and (self.admission == "on" or (self.admission == "auto" and on_gpu))

    def as_dict(self) -> dict:
        """Resolved settings for `/server_info`."""
        out = asdict(self)
        out["token_budget"] = self.budget if self.takes_budgets else None
        return out

    @classmethod
    def from_server_args(cls, server_args) -> "RheoConfig":
        """Collect the `rheoserve_*` fields of a ServerArgs."""
        return cls(**{name: getattr(server_args, PREFIX + name) for name in cls.__dataclass_fields__})

    def _refuse(self, name: str, legal: str, value=None):
        value = getattr(self, name) if value is None else value
        raise ValueError(f"{flag(name)} is {value!r}; legal: {legal}")

    def _choice(self, name: str, choices: tuple):
        if getattr(self, name) not in choices:
            self._refuse(name, ", ".join(choices))

    def _left_out(self, name: str) -> bool:
        """Whether it is None, and may be."""
        return getattr(self, name) is None and self.__dataclass_fields__[name].default is None

    def _at_least(self, name: str, low: int):
        if not self._left_out(name) and not (_is(getattr(self, name), int) and getattr(self, name) >= low):
            self._refuse(name, f"an integer of at least {low}")

    def _pages(self, name: str, at_least: int):
        value = getattr(self, name)
        if not self._left_out(name) and not (_is(value, int) and value >= at_least and value % PAGE_TOKENS == 0):
            self._refuse(name, f"a multiple of {PAGE_TOKENS}, at least {at_least}")

    def _above_zero(self, name: str):
        self._within(name, math.inf, "a finite number above 0")

    def _within(self, name: str, most: float, legal: str):
        value = getattr(self, name)
        if not self._left_out(name) and not (_is(value, int | float) and math.isfinite(value) and 0 < value <= most):
            self._refuse(name, legal)


def _is(value, kind) -> bool:
    """Whether a number is of this kind; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def flag(name: str) -> str:
    """The command-line flag of a config field."""
    return "--" + (PREFIX + name).replace("_", "-")
