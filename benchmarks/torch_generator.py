"""Samples from and trains transformers' GPT-2 on request: the baseline of generator_speed.py.

`python torch_generator.py SPECIFICATION`, as JSON. It is a separate program, so that PyTorch may be in another
environment than JAX. It prints a line of JSON with its versions, then one with the seconds of a call for each line of
input, "generate" or "train".
"""

import argparse
import json
import sys
import time


def main(specification: str) -> None:
    """Answers the requests; the first of each kind also allocates."""
    import torch
    import transformers

    spec = json.loads(specification)
    torch.set_num_threads(spec["threads"])
    size, length, batch = spec["num_embeddings"], spec["length"], spec["batch"]
    config = transformers.GPT2Config(
        vocab_size=size + 1, n_positions=length, n_embd=spec["width"], n_layer=spec["depth"], n_head=spec["heads"],
        n_inner=spec["mlp"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=size, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    codes = torch.randint(size, (batch, length))
    start = torch.full((batch, 1), size)
    inputs = torch.cat([start, codes[:, :-1]], 1)

    def generate() -> None:
        with torch.inference_mode():
            settings = {"max_new_tokens": length, "min_new_tokens": length, "pad_token_id": size, "top_k": 0}
            mask = torch.ones_like(start)
            samples = model.generate(
                start[: spec["images"]], attention_mask=mask[: spec["images"]], do_sample=True, **settings
            )
        assert samples.shape == (spec["images"], length + 1)

    def train() -> None:
        logits = model(inputs).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        {"generate": generate, "train": train}[line.strip()]()
        print(json.dumps(time.perf_counter() - begin), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specification", help="JSON that generator_speed.py writes")
    main(parser.parse_args().specification)
