"""Computes the reference of a Frechet distance: mean and covariance of a network's features over images.

vqrae reference-statistics --data=/data/train --size=256 --inception=FILE --output=ref.npz

`evaluation.inception_reference` or `evaluation.encoder_reference` names the file. Images are cropped as in evaluation:
short side to --size pixels, then the central square.
"""

import argparse

import jax

from vqrae_jax import sharding, storage
from vqrae_jax.build import judges
from vqrae_jax.commands import command_line
from vqrae_jax.config import EvaluationConfig, from_dict
from vqrae_jax.data import pipeline
from vqrae_jax.errors import DataError
from vqrae_jax.evaluation import reference
from vqrae_jax.evaluation.accumulator import Accumulator
from vqrae_jax.evaluation.moments import Moments

ARGUMENTS = command_line.DATA_ARGUMENTS | {  # by the config fields that they set
    "data.image_size": "--size", "evaluation.inception_path": "--inception", "evaluation.encoder_path": "--encoder",
    "evaluation.encoder_input_size": "--encoder-size", "evaluation.encoder_pool": "--pool",
}  # fmt: skip

parser = command_line.Parser("reference-statistics", __doc__.partition("\n\n")[0])
parser.add("--data", "folder of images, flat or in class subfolders", required=True)
parser.set_defaults(source="folder", name=None, split="train", image_key=None, label_key=None)
parser.add_count("--size", "pixels: value of data.image_size", required=True)
parser.add_max_pixels()
network = parser.add_mutually_exclusive_group(required=True)
network.add_argument("--inception", metavar="FILE", help="value of evaluation.inception_path")
network.add_argument("--encoder", help="hub id or local folder: value of evaluation.encoder_path")
parser.add_encoder_class("evaluation.encoder_cls")
parser.add_count("--encoder-size", "pixels: value of evaluation.encoder_input_size", 224)
parser.add("--pool", "value of evaluation.encoder_pool", choices=("cls", "mean"), default="cls")
parser.add("--output", "file to write, .npz", required=True)
parser.add_batch_and_limit(64)


@command_line.names_arguments(ARGUMENTS)
def reference_statistics(args: argparse.Namespace) -> Moments:
    """Runs the command; returns the moments of the features."""
    output = command_line.output_file(args.output, (".npz",))
    name = "inception" if args.inception else "encoder"
    settings = {"encoder_cls": args.encoder_cls, "encoder_input_size": args.encoder_size, "encoder_pool": args.pool}
    settings |= {"inception_path": args.inception} if args.inception else {"encoder_path": args.encoder}
    mesh = sharding.make_mesh()
    batch_size = -(-args.batch // mesh.size) * mesh.size
    data = command_line.data_config(args, image_size=args.size, eval_batch_size=batch_size)
    batches = pipeline.evaluation_batches(data, limit=args.limit)
    nets = judges.load_metric_networks(from_dict(EvaluationConfig, settings), (name, "sfid"))
    params = jax.device_put(nets.params, sharding.replicated(mesh))
    program, empty = reference.feature_program(nets, params, mesh, "image"), Accumulator(batches.count, kernel_images=0)
    total = reference.accumulate(program, batches, empty, mesh, "images")
    moments = total.moments[f"{name}/image"]
    if moments.count < 2:
        raise DataError(f"has {moments.count} readable images; two are needed", field="--data", value=args.data)
    gaussians = {n: total.moments[f"{n}/image"].gaussian() for n in nets.widths()}
    with storage.stage_output(output) as file:
        reference.write_reference(file, gaussians, nets.protocol[name])
    width = len(moments.mean)
    few = f", fewer than the {width} dimensions of the features" if moments.count < width else ""
    print(f"{moments.count} images{few}; wrote {output}")
    return moments


main = command_line.build_main(parser, reference_statistics)

if __name__ == "__main__":
    main()
