"""Pre-trains a backbone as a masked autoencoder, and draws what it reconstructs of ten validation pictures.

python tools/pretrain.py --config configs/pretraining/vrwkv_nano_digits_mae.yaml
torchrun --nproc_per_node=8 tools/pretrain.py --config CONFIG --set data.root=/data/imagenet output=output/mae

Exit codes: 0 done; 75 interrupted by SIGTERM, SIGUSR1 or Ctrl-C, to be started again with --resume auto; 1 an error.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from vrwkv.runtime.command import parse_arguments, run_training
from vrwkv.runtime.errors import command_line
from vrwkv.runtime.processes import is_primary


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    # In here, so that a missing package takes one line to tell.
    from vrwkv.pretraining import (
        PretrainingConfig,
        draw_reconstructions,
        load_autoencoder,
        load_config,
        pretrain,
        validation_pictures,
    )

    args = parse_arguments(__doc__, argv)
    config = load_config(PretrainingConfig, args.config, args.set)
    best = run_training(pretrain, config, args)
    if is_primary():
        drawn = Path(config.output) / "reconstructions.png"
        draw_reconstructions(*load_autoencoder(best), validation_pictures(config, 10)).savefig(drawn, dpi=120)
        print(f"reconstructions  {drawn}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
