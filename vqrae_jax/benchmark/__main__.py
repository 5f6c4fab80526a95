"""Times the parts of a tokenizer, compared with what this machine reaches at best and with plain PyTorch.

python -m vqrae_jax.benchmark encoder --against=pytorch
"""

import sys

from vqrae_jax import runtime
from vqrae_jax.benchmark import speed
from vqrae_jax.errors import report_errors


def main(arguments: list[str]) -> None:
    """Prepares the process and runs `speed`; an error of the user ends it with one line and its exit code."""
    runtime.keep_freed_memory()
    runtime.skip_absent_tpu()
    with report_errors(), runtime.log_lines():
        speed.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
