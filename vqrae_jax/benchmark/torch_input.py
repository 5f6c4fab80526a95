"""A PyTorch DataLoader with PIL, timed: `python torch_input.py FOLDER SIZE BATCH WORKERS EPOCHS` prints images per second.

Short side resized to SIZE (bicubic), random square, random flip, floats, ImageNet normalization: the usual transforms
of torchvision, written out. It runs as a program of its own, so that PyTorch may live in another environment than JAX.
"""

import pathlib
import sys
import time


def main(folder: str, size: int, batch: int, workers: int, epochs: int) -> None:
    """The best epoch counts; an epoch starts with the workers already running."""
    import numpy as np
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    files = sorted(pathlib.Path(folder).iterdir())
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    class Photographs(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, index):
            with Image.open(files[index]) as picture:
                picture = picture.convert("RGB")
            scale = size / min(picture.size)
            picture = picture.resize([max(size, round(x * scale)) for x in picture.size], Image.Resampling.BICUBIC)
            left, top = (int(torch.randint(x - size + 1, ())) for x in picture.size)
            picture = picture.crop((left, top, left + size, top + size))
            if torch.rand(()) < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
            return pixels.to(torch.float32).div(255).sub_(mean).div_(std)

    loader = torch.utils.data.DataLoader(
        Photographs(), batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    best = 0.0
    for epoch in range(epochs + 1):
        images, start = 0, time.perf_counter()
        for pixels in loader:
            images += len(pixels)
        if epoch:  # the first one starts the workers
            best = max(best, images / (time.perf_counter() - start))
    print(best)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
