"""Trains the teacher, fine-tunes it, or takes it over from its source: shards -> teacher/."""

from cli import main
from stages import teacher

if __name__ == "__main__":
    main("teacher", teacher, __doc__)
