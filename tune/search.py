"""Search the settings of the distillation: loss weights, fusion, thresholds, learning
rates, the teacher's rate, augmentation.

    python tune/search.py demo --space fusion --trials 16
    python tune/search.py demo --space fusion --trials 16 --resume
    python tune/search.py demo --algorithm population --trials 8
    python tune/search.py folder --images DIR --val LABELLED_DIR --classes person,dog --cloud https://detector.example.com

Shares images, answers and trained teachers with other runs below the same --root.
Results: ROOT/search/SPACE-OBJECTIVE and MLflow.
"""

import sys

from coin_ray.commands.search import main

if __name__ == "__main__":
    sys.exit(main("search.py", __doc__))
