"""Trains a layer of vector-quantize-pytorch and saves its codebook, for codebook_law.py.

`python torch_codebook.py SPECIFICATION`. It is a separate program, so that PyTorch may be in another environment than
JAX.
"""

import argparse
import json


def main(text: str) -> None:
    """Trains on the rows of each batch, by Adam if the layer has parameters."""
    import numpy as np
    import torch
    import vector_quantize_pytorch

    spec = json.loads(text)
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    latents, order = torch.from_numpy(np.load(spec["latents"])), np.load(spec["order"])
    layer = getattr(vector_quantize_pytorch, spec["layer"])(
        dim=latents.shape[1], codebook_size=spec["size"], **spec["settings"]
    )
    parameters = list(layer.parameters())
    optimizer = torch.optim.Adam(parameters, lr=spec["rate"]) if parameters else None
    layer.train()
    for rows in order:
        loss = layer(latents[rows][None])[2]
        if optimizer:
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    np.save(spec["codebook"], layer.codebook.detach().squeeze().numpy())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specification", help="JSON that codebook_law.py writes")
    main(parser.parse_args().specification)
