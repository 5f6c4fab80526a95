"""Plain PyTorch implementations of the stages, timed on request: the other side of `--against=pytorch`.

A separate program, `python torch_stages.py SPECIFICATION`, so that PyTorch may be in a different environment. It prints
JSON: the results of the first call, the bytes it needed beyond weights and inputs and versions, then for each line of
input the seconds of one more call.
"""

import importlib.metadata
import importlib.util
import json
import sys
import time

NORM_EPS = 1e-6


def build_encoder(spec, tensors):
    """Builds Hugging Face's DINOv2 with SDPA; returns patch tokens after a LayerNorm without scale and bias."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(**spec["encoder"], attn_implementation="sdpa")).eval()
    weights = {n.removeprefix("encoder/"): t for n, t in tensors.items() if n.startswith("encoder/")}
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys, result
    assert set(result.missing_keys) <= {"layernorm.weight", "layernorm.bias", "embeddings.mask_token"}, result
    mean, std = (torch.tensor(spec[n]).view(1, 3, 1, 1) for n in ("mean", "std"))
    model.register_buffer("pixel_mean", mean)
    model.register_buffer("pixel_std", std)

    def encode(images):
        pixels = torch.nn.functional.interpolate(images, spec["input_size"], mode="bicubic", align_corners=False)
        hidden = model((pixels - model.pixel_mean) / model.pixel_std).last_hidden_state[:, 1:]
        return torch.nn.functional.layer_norm(hidden.float(), hidden.shape[-1:], eps=NORM_EPS)

    return model, encode


def build_decoder(spec, tensors):
    """Builds a ViT decoder of ViTMAE layers: embedding, cls token, positions, blocks, norm, linear map to pixels."""
    import torch
    from torch import nn
    from transformers import ViTMAEConfig
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAELayer

    size = spec["decoder"]
    config = ViTMAEConfig(
        hidden_size=size["width"], num_hidden_layers=size["depth"], num_attention_heads=size["heads"],
        intermediate_size=size["mlp"], layer_norm_eps=size["eps"], attn_implementation="sdpa",
    )  # fmt: skip

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder_embed = nn.Linear(spec["channels"], size["width"])
            self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, size["width"]))
            self.register_buffer("decoder_pos_embed", torch.zeros(1, size["grid"] ** 2 + 1, size["width"]))
            self.decoder_layers = nn.ModuleList(ViTMAELayer(config) for _ in range(size["depth"]))
            self.decoder_norm = nn.LayerNorm(size["width"], eps=size["eps"])
            self.decoder_pred = nn.Linear(size["width"], size["patch"] ** 2 * 3)
            self.register_buffer("pixel_mean", torch.tensor(spec["mean"]).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("pixel_std", torch.tensor(spec["std"]).view(1, 3, 1, 1), persistent=False)

        def forward(self, latent):
            x = self.decoder_embed(latent)
            x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], 1) + self.decoder_pos_embed
            for layer in self.decoder_layers:
                x = layer(x)
            pixels = self.decoder_pred(self.decoder_norm(x[:, 1:])).float()
            grid, patch = size["grid"], size["patch"]
            pixels = pixels.view(len(x), grid, grid, patch, patch, 3).permute(0, 5, 1, 3, 2, 4)
            return pixels.reshape(len(x), 3, grid * patch, grid * patch) * self.pixel_std + self.pixel_mean

    model = Decoder()
    model.load_state_dict({_rename(n): t for n, t in tensors.items() if n.startswith("decoder/")})
    return model


def _rename(name):
    """Maps a name of the PyTorch VQRAE's decoder to the name in transformers 5."""
    name = name.removeprefix("decoder/")
    for ours, theirs in (
        ("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


class TextbookVQ:
    """The common implementation of EMA vector quantization: all distances at once, one-hot products for the sums."""

    def __init__(self, codebook, decay, epsilon, commitment):
        import torch

        self.codebook, self.sums = codebook, codebook.clone()
        self.counts = torch.ones(len(codebook), device=codebook.device)
        self.decay, self.epsilon, self.commitment = decay, epsilon, commitment

    def __call__(self, z):
        import torch

        flat = z.reshape(-1, z.shape[-1])
        with torch.no_grad():
            codebook = self.codebook
            distances = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ codebook.T + codebook.pow(2).sum(1)
            indices = distances.argmin(1)
            one_hot = torch.zeros(len(flat), len(codebook), device=flat.device).scatter_(1, indices[:, None], 1.0)
            quantized = one_hot @ codebook
            self.counts.mul_(self.decay).add_(one_hot.sum(0), alpha=1 - self.decay)
            self.sums.mul_(self.decay).add_(one_hot.T @ flat, alpha=1 - self.decay)
            total = self.counts.sum()
            smoothed = (self.counts + self.epsilon) / (total + len(codebook) * self.epsilon) * total
            self.codebook = self.sums / smoothed[:, None]
        loss = ((quantized - flat.detach()) ** 2).mean() + self.commitment * ((quantized - flat) ** 2).mean()
        return (flat + (quantized - flat).detach()).view_as(z), loss, indices


def encoder(spec, tensors):
    """Returns a call that computes the frozen encoder's features."""
    import torch

    model, encode = build_encoder(spec, tensors)
    model.to(tensors["images"].device)
    encode = torch.compile(encode) if spec["compile"] else encode

    def call():
        with torch.no_grad():
            return {"features": encode(tensors["images"])}

    return call


def codes(spec, tensors):
    """Returns a call that encodes images and finds the nearest code of every token."""
    import torch

    model, encode = build_encoder(spec, tensors)
    model.to(tensors["images"].device)
    codebook = tensors["codebook"]

    def nearest(images):
        latent = encode(images).flatten(0, 1)
        with torch.autocast(images.device.type, enabled=False):
            return (codebook.pow(2).sum(1) - 2 * latent @ codebook.T).argmin(1)

    nearest = torch.compile(nearest) if spec["compile"] else nearest

    def call():
        with torch.no_grad():
            return {"indices": nearest(tensors["images"])}

    return call


def decoder(spec, tensors):
    """Returns a call that decodes latents to images, without gradients."""
    import torch

    model = build_decoder(spec, tensors).to(tensors["latent"].device).eval()
    decode = torch.compile(model) if spec["compile"] else model

    def call():
        with torch.no_grad():
            return {"images": decode(tensors["latent"]).permute(0, 2, 3, 1)}

    return call


def quantizer(spec, tensors):
    """Returns a call that runs one training step of the quantizer."""
    import torch

    layer = TextbookVQ(tensors["codebook"], **spec["quantizer"])
    run = torch.compile(layer.__call__) if spec["compile"] else layer

    def call():
        with torch.no_grad():
            _, loss, indices = run(tensors["latent"])
        return {"loss": loss, "indices": indices}

    return call


class Training:
    """The PyTorch VQRAE's training: frozen encoder, quantizer, decoder, L1, fused AdamW, moving average."""

    def __init__(self, spec, tensors):
        import torch

        device = tensors["codebook"].device
        frozen, encode = build_encoder(spec, tensors)
        frozen.to(device).requires_grad_(False)
        self.model = build_decoder(spec, tensors).to(device)
        self.layer = TextbookVQ(tensors["codebook"], **spec["quantizer"])
        self.parameters, self.ema_decay = list(self.model.parameters()), spec["ema_decay"]
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, **spec["optimizer"], fused=True)
        self.decode = torch.compile(self.model) if spec["compile"] else self.model
        self.encode = torch.compile(encode) if spec["compile"] else encode

    def step(self, images):
        """Takes one step on images [B, 3, H, W]; returns the losses."""
        import torch

        with torch.no_grad():
            latent = self.encode(images)
        with torch.autocast(images.device.type, enabled=False):
            quantized, vq_loss, _ = self.layer(latent)
        pixel = (self.decode(quantized) - images).abs().mean()
        (pixel + vq_loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1 - self.ema_decay)
        return {"loss": (pixel + vq_loss).detach(), "pixel": pixel.detach()}


def train_step(spec, tensors):
    """Returns a call that runs one training step."""
    training = Training(spec, tensors)
    return lambda: training.step(tensors["images"])


def products(spec, tensors):
    """Returns a call that measures the FLOPs per second of the fastest matrix product."""
    import torch

    device, dtype = tensors["latent"].device, getattr(torch, spec["dtype"])
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def call():
        best = 0.0
        for m, n, k in spec["shapes"] * spec["repeats"]:
            a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
            synchronize()
            start = time.perf_counter()
            torch.matmul(a, b)
            synchronize()
            best = max(best, 2 * m * n * k / (time.perf_counter() - start))
        return {"flops": torch.tensor(best)}

    return call


STAGES = {f.__name__: f for f in (encoder, codes, decoder, quantizer, train_step, products)}


def main(path):
    """Builds the stage that the file at `path` specifies, then runs one call per line of input."""
    import torch
    from safetensors.torch import load_file

    with open(path) as file:
        spec = json.load(file)
    device = torch.device("cuda" if spec["platform"] == "gpu" else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(spec["threads"])
    tensors = {n: t.to(device) for n, t in load_file(spec["tensors"]).items()}
    call = STAGES[spec["stage"]](spec, tensors)

    def run():
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=spec["dtype"] == "bfloat16"):
            results = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return results, time.perf_counter() - start

    before = memory(device)
    results, _ = run()
    used = memory(device, peak=True) - before
    values = {n: t.double().flatten()[: spec["max_values"]].tolist() for n, t in results.items()}
    capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.version.cuda
    versions = {"torch": f"{torch.__version__} ({capability})"}
    if importlib.util.find_spec("transformers"):
        versions["transformers"] = importlib.metadata.version("transformers")
    print(json.dumps({"memory": used, "results": values, "versions": versions}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": run()[1]}), flush=True)


def memory(device, peak=False):
    """Returns the bytes in use, now or at the peak: of tensors on a GPU, of the process on a CPU."""
    import torch

    if device.type == "cuda":
        if not peak:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    name = "VmHWM" if peak else "VmRSS"  # getrusage has the peak of the process that started this one
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(sys.argv[1])
