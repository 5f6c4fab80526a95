"""Trains as the PyTorch VQRAE does, some steps per request: the baseline of time_to_quality.py.

`python torch_training.py STAGES SPECIFICATION`, where STAGES is the path of torch_stages.py. It is a separate program,
so that PyTorch may be in another environment than JAX. For each line of input, {"steps": n} or {"save": file}, it
prints a line of JSON: the seconds of n steps, or nothing after it has saved the reconstructions of the validation
images, by the moving average of the parameters, as [n, H, W, 3].
"""

import argparse
import json
import math
import runpy
import sys
import time


def main(stages: str, path: str) -> None:
    """Answers the requests; images are drawn in epochs of random order, and mirrored with probability 1/2."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    with open(path) as file:
        spec = json.load(file)
    torch.set_num_threads(spec["threads"])
    rng = np.random.default_rng(spec["seed"])
    tensors = load_file(spec["tensors"])
    images, validation = (tensors.pop(name).permute(0, 3, 1, 2) for name in ("train", "validation"))
    training, taken, order = runpy.run_path(stages)["Training"](spec, tensors), 0, []

    def batch():
        nonlocal order
        if len(order) < spec["batch"]:
            order = rng.permutation(len(images)).tolist()
        chosen, order = order[: spec["batch"]], order[spec["batch"] :]
        pixels = images[chosen].float() / 255
        return torch.where(torch.from_numpy(rng.random((len(pixels), 1, 1, 1)) < 0.5), pixels.flip(3), pixels)

    def train(steps: int) -> float:
        nonlocal taken
        start = time.perf_counter()
        for _ in range(steps):
            cosine = 0.5 * (1 + math.cos(math.pi * taken / spec["steps"]))
            rate = spec["final"] + (spec["optimizer"]["lr"] - spec["final"]) * cosine
            for group in training.optimizer.param_groups:
                group["lr"] = rate
            training.ema_decay = min(spec["ema_decay"], (1 + taken) / (10 + taken))  # otherwise short runs lag behind
            training.step(batch())
            taken += 1
        return time.perf_counter() - start

    def save(file: str) -> None:
        live = [p.detach().clone() for p in training.parameters]
        with torch.no_grad():
            torch._foreach_copy_(training.parameters, training.ema)
            parts = [reconstruct(part.float() / 255) for part in validation.split(20)]
            torch._foreach_copy_(training.parameters, live)
        np.save(file, torch.cat(parts).permute(0, 2, 3, 1).numpy())

    def reconstruct(pixels):
        latent = training.encode(pixels)
        flat, codebook = latent.flatten(0, 1), training.layer.codebook
        indices = (codebook.pow(2).sum(1) - 2 * flat @ codebook.T).argmin(1)
        return training.model(codebook[indices].view_as(latent))

    for line in sys.stdin:
        request = json.loads(line)
        seconds = train(request["steps"]) if "steps" in request else save(request["save"])
        print(json.dumps({"seconds": seconds, "version": torch.__version__}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", help="path of torch_stages.py")
    parser.add_argument("specification", help="JSON file that time_to_quality.py writes")
    arguments = parser.parse_args()
    main(arguments.stages, arguments.specification)
