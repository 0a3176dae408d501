"""`python -m rlhf_course` is the command `rlhf-course`."""

import sys

from rlhf_course.pipeline import main

if __name__ == "__main__":
    sys.exit(main())
