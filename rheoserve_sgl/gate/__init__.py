"""Gates that need no weights, by the name of `--rheoserve-selector`."""

from rheoserve_sgl.gate.base import Gate
from rheoserve_sgl.gate.mean import MeanGate
from rheoserve_sgl.gate.oracle import OracleGate
from rheoserve_sgl.gate.quest import QuestGate

GATES = {"quest": QuestGate, "mean": MeanGate, "oracle": OracleGate}


def make_gate(selector: str) -> Gate:
    return GATES[selector]()
