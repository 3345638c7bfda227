"""Labels of a run to people, those in dispute first, and back as a data set. What they
correct outranks every teacher: full.py --corrections.

python pipelines/review.py out label-studio|cvat|fiftyone --root ROOT --out FOLDER [--most N]
python pipelines/review.py back EXPORT --out FOLDER [--format coco]
"""

import sys

from coin_ray.commands.review import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__ or ""))
