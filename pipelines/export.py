"""Write the student to take home: ONNX, TorchScript, safetensors, a model card and an
example, running first whatever this needs.

python pipelines/export.py demo [--out DIR] [--add-classes "truck,fire hydrant"] [--int8] [--dry-run]
"""

import sys

from coin_ray.commands.export import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
