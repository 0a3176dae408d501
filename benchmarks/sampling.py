"""Useful tokens a second of the course's sampler, beside transformers' `generate`.

    python benchmarks/sampling.py [--record]

The same small Llama, prompts, batch of 64 and one thread. Responses may be as long as eight times their median, so that a few long ones
keep the batch waiting: `generate` computes all rows until the last has ended, the course's sampler drops a row with its end token. Useful
tokens are those up to the end token. The two take turns with the same seeds; the last column is the median of the ratios of
seven rounds. The aim is at least 1.8. The second table counts the places that each computes, useful or not.
With --record benchmarks/results/sampling.json keeps the rates of all rounds.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from records import keep
from transformers import GenerationConfig

from rlhf_course.tiny_arena import tiny_arena
from rlhf_course.tiny_lm import encode_prompts, load_tiny_lm, sample_responses

ROUNDS, BATCH = 7, 64


def useful(response_ids: torch.Tensor, eos: int) -> tuple[int, int]:
    """Tokens up to each end token, and places computed where no row is dropped."""
    is_eos = response_ids == eos
    lengths = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, response_ids.shape[1])
    return int(lengths.sum()), response_ids.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="keep what was measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_tiny_lm()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompts = tiny_arena().prompts
    ids, mask = encode_prompts(tokenizer, prompts[:512])
    lengths = sample_responses(model, ids, mask, max_new_tokens=256, eos_token_id=eos, pad_token_id=pad,
                               generator=torch.Generator().manual_seed(1)).response_mask.sum(1)  # fmt: skip
    longest = 8 * int(lengths.median())
    print(f"responses: median {int(lengths.median())}, longest {int(lengths.max())} of {len(lengths)}; max_new_tokens {longest}")
    settings = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=longest, eos_token_id=eos, pad_token_id=pad)
    settings.renormalize_logits = False

    def ours(seed: int, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return sample_responses(model, ids, mask, max_new_tokens=longest, eos_token_id=eos, pad_token_id=pad,
                                generator=torch.Generator().manual_seed(seed)).response_ids  # fmt: skip

    def theirs(seed: int, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1]:]

    rates = {"rlhf_course": [], "transformers": []}
    places = {"rlhf_course": 0, "transformers": 0}
    tokens = {"rlhf_course": 0, "transformers": 0}
    for number in range(-1, ROUNDS):  # the first round warms up
        ids, mask = encode_prompts(tokenizer, prompts[BATCH * (number + 1):BATCH * (number + 2)])
        for name, sampler in (("rlhf_course", ours), ("transformers", theirs)):
            start = time.perf_counter()
            response_ids = sampler(number + 1, ids, mask)
            seconds = time.perf_counter() - start
            if number >= 0:
                n_useful, n_places = useful(response_ids, eos)
                rates[name].append(n_useful / seconds)
                tokens[name] += n_useful
                places[name] += n_useful if name == "rlhf_course" else n_places
    for name, values in rates.items():
        print(f"{name:13s} {statistics.median(values):8.0f} useful tokens a second   "
              f"{tokens[name]:6d} useful of {places[name]:6d} computed ({tokens[name] / places[name]:.0%})")
    ratios = [a / b for a, b in zip(rates["rlhf_course"], rates["transformers"])]
    print(f"ratio, median of {ROUNDS} rounds: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    if arguments.record:
        keep("sampling", {"batch_size": BATCH, "rounds": ROUNDS, "max_new_tokens": longest}, {"useful_tokens_per_second": rates, "computed": places, "useful": tokens})


if __name__ == "__main__":
    main()
