"""Penalties of batches that decode in part, with SGLang's own penalizers, against those of each request alone."""

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling import penaltylib

from rheoserve_sgl.runtime.penalties import cumulate, part_of, write_back

VOCABULARY, REQUESTS = 17, 4
KINDS = {
    penaltylib.BatchedFrequencyPenalizer,
    penaltylib.BatchedMinNewTokensPenalizer,
    penaltylib.BatchedPresencePenalizer,
    penaltylib.BatchedRepetitionPenalizer,
}
NONE = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
ASKED = [{"frequency_penalty": 0.5}, {"presence_penalty": 1.0, "repetition_penalty": 1.5}, {}, {"min_new_tokens": 3}]


class Batch(SimpleNamespace):
    """What penalties see of a ScheduleBatch."""

    def __init__(self, requests, penalizers=None):
        super().__init__(reqs=requests, device="cpu", forward_mode=ForwardMode.DECODE)
        self.sampling_info = SimpleNamespace()
        self.penalties = penalizers or penaltylib.BatchedPenalizerOrchestrator(VOCABULARY, self, KINDS)

    @property
    def penalties(self):
        return self.sampling_info.penalizer_orchestrator

    @penalties.setter
    def penalties(self, orchestrator):
        self.sampling_info.penalizer_orchestrator = orchestrator

    def cut(self, rows):
        """As runtime/slots.py and `ScheduleBatch.filter_batch` do."""
        part = Batch(self.reqs, self.penalties)
        part.penalties = part_of(self.penalties, part)
        part.reqs = [self.reqs[row] for row in rows]
        part.penalties.filter(torch.tensor(rows))
        return part

    def logits(self):
        logits = torch.ones(len(self.reqs), VOCABULARY)
        self.penalties.apply(logits)
        return logits


def make_request(asked):
    params = SimpleNamespace(**NONE | asked, stop_token_ids={5})
    tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=2)
    return SimpleNamespace(sampling_params=params, tokenizer=tokenizer, origin_input_ids=[7], output_ids=[])


rows = st.lists(st.integers(0, REQUESTS - 1), min_size=1, unique=True).map(sorted)


@settings(deadline=None)
@given(st.lists(st.tuples(rows, st.booleans()), max_size=12), st.permutations(ASKED), st.randoms())
def test_parts_that_overlap_count_as_requests_that_are_alone(steps, asked, random):
    """Each step: some rows decode; then, or not, something else runs before the next step is prepared."""
    requests = [make_request(one) for one in asked]
    for request in requests:
        request.output_ids.append(random.randrange(VOCABULARY))  # of the prefill
    whole, alone = Batch(requests), [Batch([request]) for request in requests]
    counted = [0] * REQUESTS
    launched, pending = None, {}
    for chosen, between in steps:
        part = whole.cut(chosen) if len(chosen) < REQUESTS else whole
        cumulate(part, launched)
        if part is not whole:
            write_back(part.penalties, whole.penalties, chosen)
        for row in chosen:  # the prompt's last token, then each answer's, a step late
            token = [7, *requests[row].output_ids][counted[row]]
            alone[row].penalties.cumulate_output_tokens(torch.tensor([token]))
            counted[row] += 1
        expected = torch.cat([batch.logits() for batch in alone])
        assert torch.equal(part.logits(), expected[chosen]) and torch.equal(whole.logits(), expected)
        for row, token in pending.items():  # of the step before, which ends while this one runs
            requests[row].output_ids.append(token)
        launched, pending = part, {row: random.randrange(VOCABULARY) for row in chosen}
        if between:
            for row, token in pending.items():
                requests[row].output_ids.append(token)
            launched, pending = None, {}


def test_a_request_that_comes_back_from_a_retraction_has_each_token_counted():
    """Its new prefill is in flight when its next step is prepared, and gives the token that is not known yet."""
    back, counted = make_request(NONE), []
    back.output_ids += [11, 12, 13]
    orchestrator = SimpleNamespace(cumulate_output_tokens=lambda tokens: counted.extend(tokens.tolist()))
    batch = SimpleNamespace(
        reqs=[back], device="cpu", sampling_info=SimpleNamespace(penalizer_orchestrator=orchestrator)
    )
    cumulate(batch, batch)
    back.output_ids.append(14)
    cumulate(batch, batch)
    assert counted == [13, 14]
