"""Ask the cloud about every image and CLIP about every box, running first whatever this
needs and is not finished.

python pipelines/collect.py demo [--dry-run]
python pipelines/collect.py views PRESET [--sample 40]          in which view of your images the cloud sees most
python pipelines/collect.py labels check|propose --help       label maps, from names in answers already paid
python pipelines/collect.py journal show|verify|compact --root ROOT
"""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] in (["labels"], ["journal"]):
        from coin_ray.commands import labels as tools

        sys.exit(tools.main(sys.argv[1:]))
    if sys.argv[1:2] == ["views"]:
        from coin_ray.commands import renderings as pilot

        sys.exit(pilot.main(sys.argv[2:]))
    from coin_ray.commands.arguments import main

    sys.exit(main("collect.py", __doc__, only="collect"))
