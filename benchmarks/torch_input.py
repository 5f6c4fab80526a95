"""Prints images per CPU second of a PyTorch DataLoader with PIL.

python benchmarks/torch_input.py photographs/train 256 64 1 3

The usual transforms of torchvision, written out: short side resized to SIZE (bicubic), random square, random flip,
floats, ImageNet normalization. It also prints versions. It is a separate program, so that PyTorch may be in another
environment than JAX.
"""

import argparse
import pathlib
import resource


def main(folder: str, size: int, batch: int, workers: int, epochs: int) -> None:
    """Measures the CPU time of this process and its workers, without the time to start them."""
    import numpy as np
    import PIL
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    files = sorted(pathlib.Path(folder).iterdir())
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    class Photographs(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, index):
            with Image.open(files[index]) as image:
                image = image.convert("RGB")
            scale = size / min(image.size)
            image = image.resize([max(size, round(x * scale)) for x in image.size], Image.Resampling.BICUBIC)
            left, top = (int(torch.randint(x - size + 1, ())) for x in image.size)
            image = image.crop((left, top, left + size, top + size))
            if torch.rand(()) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
            return pixels.to(torch.float32).div(255).sub_(mean).div_(std)

    def measure(epochs: int) -> float:
        loader = torch.utils.data.DataLoader(
            Photographs(), batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
        )
        before = _cpu_seconds()
        for _ in range(epochs):
            for _ in loader:
                pass
        del loader  # the time of its workers counts once they have ended
        return _cpu_seconds() - before

    measure(1)
    print(epochs * (len(files) // batch) * batch / (measure(1 + epochs) - measure(1)))
    print(f"torch {torch.__version__}, Pillow {PIL.__version__}")


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of images")
    for name in ("size", "batch", "workers", "epochs"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    if not pathlib.Path(args.folder).is_dir():
        parser.error(f"{args.folder} is not a folder")
    main(**vars(args))
