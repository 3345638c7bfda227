"""``coin-ray collect``, as a script for ``ray job submit``; also ``coin-ray labels`` and
``coin-ray journal``.
"""

import sys

from coin_ray.commands.main import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] not in (["labels"], ["journal"]):
        arguments = ["collect", *arguments]
    sys.exit(main(arguments))
