"""Gives every training row to its expert: encoded + router -> assigned/."""

from cli import main
from stages import assign

if __name__ == "__main__":
    main("assign", assign, __doc__)
