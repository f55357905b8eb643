"""Next-token loss while decoding: a request is made to generate a given text, and tells how likely it found each token.

Only decoding is sparse; a prompt's own log probabilities come from prefill, which is dense. Needs a server with
`--enable-custom-logit-processor`.
"""

from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from benchmarks.accuracy.client import generate


class ForcedTokens(CustomLogitProcessor):
    """Gives the tokens of `custom_params["forced"]`, one after another, whatever the model's logits are.

    A greedy request's log probabilities are those of the logits that it returns. They have two tokens: the forced one,
    which is the best, and a second one that lies below it by 1 - log p, where p is what the model gave the forced one.
    """

    def __call__(self, logits, custom_param_list=None):
        import torch

        for row, params in enumerate(custom_param_list or []):
            at = params.get("at", 0)
            params["at"] = at + 1
            if at >= len(params["forced"]):
                continue
            token = params["forced"][at]
            log_p = torch.log_softmax(logits[row].float(), -1)[token]
            logits[row] = -1e9
            logits[row, token] = 0.0
            logits[row, 0 if token else 1] = (log_p - 1.0).to(logits.dtype)
        return logits


# Taken along by value, so that the server needs no module of this name.
ForcedTokens.__module__ = "__main__"
PROCESSOR = ForcedTokens.to_str()


def forced_losses(url: str, prompt: list[int], forced: list[int], options: dict | None) -> list[float]:
    """Minus the log probability of each forced token after the prompt and those before it.

    Args:
        options: RheoServe's, for this request
    """
    # Cached first: of a prompt in several chunks each would call the processor, which counts its calls.
    generate(url, {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1}})
    params = {"forced": forced} | ({"rheoserve": options} if options else {})
    sampling = {"temperature": 0, "max_new_tokens": len(forced), "ignore_eos": True, "custom_params": params}
    answer = generate(
        url,
        {
            "input_ids": prompt,
            "sampling_params": sampling,
            "custom_logit_processor": PROCESSOR,
            "return_logprob": True,
            "top_logprobs_num": 2,
        },
    )
    got = answer["output_ids"]
    if len(got) < len(forced):
        raise RuntimeError(f"{url} ends after {len(got)} of {len(forced)} tokens: its --context-length is too small")
    if got != forced:
        raise RuntimeError(f"{url} does not run the logit processor: start it with --enable-custom-logit-processor")
    return [-(second[0] - first[0] + 1.0) for first, second in answer["meta_info"]["output_top_logprobs"]]
