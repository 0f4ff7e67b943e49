"""Draws samples with teacher and experts and writes the page of figures: everything before -> report/, images/."""

from cli import main
from stages import report

if __name__ == "__main__":
    main("report", report, __doc__)
