"""python -m vqrae_jax.commands.reference_statistics --data=/data/train --size=256 --inception=FILE --output=ref.npz

Mean and covariance of a network's features over a folder of images, for `evaluation.inception_reference` or
`evaluation.encoder_reference`. Images are cropped as in evaluation: short side to `size`, then the central square.
"""

import argparse
from collections.abc import Sequence
from typing import get_args

import jax

from vqrae_jax import sharding, storage
from vqrae_jax.build import judges
from vqrae_jax.commands import command_line as command
from vqrae_jax.commands import data_arguments as data_flags
from vqrae_jax.config import DataConfig, EncoderClass, EvaluationConfig, from_dict
from vqrae_jax.data import pipeline
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation import reference
from vqrae_jax.evaluation.moments import Moments


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vqrae_jax.commands.reference_statistics",
        description=__doc__.partition("\n\n")[2],
    )
    parser.add_argument("--data", required=True, help="folder of images, flat or in class subfolders")
    parser.add_argument("--size", type=command.at_least_1, required=True, help="pixels, as data.image_size")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--inception", metavar="FILE", help="file, as evaluation.inception_path")
    network.add_argument("--encoder", help="hub id or local folder, as evaluation.encoder_path")
    parser.add_argument(
        "--encoder-cls", choices=get_args(EncoderClass), default="Dinov2withNorm", metavar="ENCODER_CLS",
        help="as evaluation.encoder_cls; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--encoder-size",
        type=command.at_least_1,
        default=224,
        help="pixels, as evaluation.encoder_input_size; default: %(default)s",
    )
    parser.add_argument(
        "--pool", choices=("cls", "mean"), default="cls", help="as evaluation.encoder_pool; default: %(default)s"
    )
    parser.add_argument("--output", required=True, help="file to write, .npz")
    parser.add_argument("--batch", type=command.at_least_1, default=64, help="images at once; default: %(default)s")
    parser.add_argument("--limit", type=command.at_least_1, help="images to use; all by default")
    return parser.parse_args(argv)


@data_flags.told()
def reference_statistics(args: argparse.Namespace) -> Moments:
    """Runs the command; returns what it wrote."""
    output = storage.resolve_path(args.output)
    if output.suffix != ".npz":
        raise DataError(f"--output={output}: the statistics are written as .npz")
    name = "inception" if args.inception else "encoder"
    settings = {"encoder_cls": args.encoder_cls, "encoder_input_size": args.encoder_size, "encoder_pool": args.pool}
    settings |= {"inception_path": args.inception} if args.inception else {"encoder_path": args.encoder}
    mesh = sharding.make_mesh()
    size = -(-args.batch // mesh.size) * mesh.size
    data = {"source": "folder", "eval_path": args.data, "image_size": args.size, "eval_batch_size": size}
    batches = pipeline.evaluation_batches(from_dict(DataConfig, data), limit=args.limit)
    nets = judges.load_metric_networks(from_dict(EvaluationConfig, settings), (name,))
    moments = reference.feature_moments(nets, jax.device_put(nets.params, sharding.replicated(mesh)), batches, mesh)[
        name
    ]
    if moments.count < 2:
        raise DataError(f"--data={args.data}: {moments.count} of its images can be read; a covariance needs two")
    gaussian = moments.gaussian()
    with storage.stage_output(output) as place:
        reference.write(place, gaussian)
    width = len(gaussian.mean)
    few = f", fewer than the {width} dimensions of the features" if moments.count < width else ""
    print(f"{moments.count} images{few}; wrote {output}")
    return moments


def main() -> None:
    command.run(lambda: reference_statistics(parse()))


if __name__ == "__main__":
    main()
